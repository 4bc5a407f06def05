-- keep_schedule: a schedule of an app; one that is new, another by now, or back begins now
INSERT INTO {schema}.schedule AS known ({schedule_columns})
VALUES (:environment, :name, :app, :task, :expression, :zone, :now_us, 0, 0)
ON CONFLICT (environment, name) DO UPDATE SET app = excluded.app, task = excluded.task, expression = excluded.expression,
    zone = excluded.zone, gone_us = 0,
    last_us = CASE WHEN known.gone_us = 0 AND known.expression = excluded.expression AND known.zone = excluded.zone
        THEN known.last_us ELSE greatest(known.last_us, excluded.last_us) END;

-- leave_schedules: those of an app that its code has no more
UPDATE {schema}.schedule SET gone_us = :now_us
WHERE environment = :environment AND app = :app AND gone_us = 0 AND name NOT IN (SELECT jsonb_array_elements_text(:names::jsonb));

-- move_schedule: the guard of a tick; no row when the schedule stands elsewhere or is another by now
UPDATE {schema}.schedule SET last_us = :until_us, gone_us = 0,
    ticked_us = CASE WHEN :runs_count > 0 THEN :until_us ELSE ticked_us END
WHERE environment = :environment AND name = :name AND expression = :expression AND zone = :zone
    AND last_us = :last_us AND last_us < :until_us
RETURNING 1;

-- schedule: one schedule as it stands
SELECT {schedule_columns} FROM {schema}.schedule
WHERE environment = :environment AND name = :name;

-- schedules: all schedules of an environment, by name
SELECT {schedule_columns} FROM {schema}.schedule
WHERE environment = :environment ORDER BY name;
