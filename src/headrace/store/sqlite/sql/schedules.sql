-- keep_schedule: store a schedule; it begins now if it is new, was gone, or has another expression or zone
INSERT INTO headrace_schedule AS known ({schedule_columns})
VALUES (:environment, :name, :app, :task, :expression, :zone, :now_us, 0, 0)
ON CONFLICT (environment, name) DO UPDATE SET app = excluded.app, task = excluded.task, expression = excluded.expression,
    zone = excluded.zone, gone_us = 0,
    last_us = CASE WHEN known.gone_us = 0 AND known.expression = excluded.expression AND known.zone = excluded.zone
        THEN known.last_us ELSE max(known.last_us, excluded.last_us) END;

-- leave_schedules: mark those schedules of an app as gone that its code does not declare
UPDATE headrace_schedule SET gone_us = :now_us
WHERE environment = :environment AND app = :app AND gone_us = 0 AND name NOT IN (SELECT value FROM json_each(:names));

-- move_schedule: advance a schedule, as the guard of a tick; returns no row if it has advanced or changed already
UPDATE headrace_schedule SET last_us = :until_us, gone_us = 0,
    ticked_us = CASE WHEN :runs_count > 0 THEN :until_us ELSE ticked_us END
WHERE environment = :environment AND name = :name AND expression = :expression AND zone = :zone
    AND last_us = :last_us AND last_us < :until_us
RETURNING 1;

-- schedule: read one schedule
SELECT {schedule_columns} FROM headrace_schedule
WHERE environment = :environment AND name = :name;

-- schedules: list all schedules of an environment, by name
SELECT {schedule_columns} FROM headrace_schedule
WHERE environment = :environment ORDER BY name;
