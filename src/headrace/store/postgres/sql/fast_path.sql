-- settle_stretch: settle consecutive runs of one lease that ended finally, with counters and completion
-- A row is read as it is locked: first the span, then the batch (R8, rows are locked in id order).
WITH ended AS (
    UPDATE {schema}.span SET unsettled_count = unsettled_count - :runs_count::bigint,
        state = CASE unsettled_count WHEN :runs_count::bigint THEN 'done' ELSE state END,
        session_id = CASE unsettled_count WHEN :runs_count::bigint THEN '' ELSE session_id END,
        claim_no = CASE unsettled_count WHEN :runs_count::bigint THEN 0 ELSE claim_no END,
        states = overlay(states PLACING :codes::bytea FROM :span_slot::int + 1)
    WHERE id = :span_id::bigint AND token = :token::bigint AND starts_with(state, 'leased') AND (dead_letter = 0 OR :failed::bigint = 0)
        AND :span_slot::int + :runs_count::int <= octet_length(states)
        AND (:is_whole::int = 0 OR :runs_count::int = octet_length(states))
        AND btrim(substring(states FROM :span_slot::int + 1 FOR :runs_count::int), 'ws'::bytea) = ''::bytea
    RETURNING block_id, batch_id, positions
),
counted AS (
    UPDATE {schema}.batch SET {outcome_counts(:)},
        state = CASE WHEN state = 'sealed' AND {ends_batch(:runs_count::bigint)} THEN 'completed' ELSE state END,
        finished_us = CASE WHEN {ends_batch(:runs_count::bigint)} THEN :now_us::bigint ELSE finished_us END
    WHERE id = (SELECT batch_id FROM ended)
)
INSERT INTO {schema}.part ({part_columns})
SELECT block_id, :span_id::bigint, :token::bigint, :part_no::bigint, :now_us::bigint,
    CASE WHEN :is_whole::int = 1 THEN positions
        ELSE coalesce(substring(positions FROM 2 * :span_slot::int + 1 FOR 2 * :runs_count::int), :span_slots::bytea) END,
    :codes::bytea, :results::bytea
FROM ended RETURNING 1;

-- settle_stretches: settle runs of one lease that are not consecutive; each stretch follows runs that stay unchanged
WITH ended AS (
    UPDATE {schema}.span SET unsettled_count = unsettled_count - :runs_count::bigint,
        state = CASE unsettled_count WHEN :runs_count::bigint THEN 'done' ELSE state END,
        session_id = CASE unsettled_count WHEN :runs_count::bigint THEN '' ELSE session_id END,
        claim_no = CASE unsettled_count WHEN :runs_count::bigint THEN 0 ELSE claim_no END,
        states = (
            SELECT string_agg(substring(states FROM kept_from + 1 FOR kept_count)
                || substring(:codes::bytea FROM codes_from + 1 FOR codes_count), ''::bytea)
            FROM (SELECT unnest(:kept_from::int[]) AS kept_from, unnest(:kept_count::int[]) AS kept_count,
                unnest(:codes_from::int[]) AS codes_from, unnest(:codes_count::int[]) AS codes_count) AS stretches
        ) || substring(states FROM :end::int + 1)
    WHERE id = :span_id::bigint AND token = :token::bigint AND starts_with(state, 'leased') AND (dead_letter = 0 OR :failed::bigint = 0)
        AND :end::int <= octet_length(states)
        AND btrim((
            SELECT string_agg(substring(states FROM kept_from + kept_count + 1 FOR codes_count), ''::bytea)
            FROM (SELECT unnest(:kept_from::int[]) AS kept_from, unnest(:kept_count::int[]) AS kept_count,
                unnest(:codes_count::int[]) AS codes_count) AS stretches
        ), 'ws'::bytea) = ''::bytea
    RETURNING block_id, batch_id, positions
),
counted AS (
    UPDATE {schema}.batch SET {outcome_counts(:)},
        state = CASE WHEN state = 'sealed' AND {ends_batch(:runs_count::bigint)} THEN 'completed' ELSE state END,
        finished_us = CASE WHEN {ends_batch(:runs_count::bigint)} THEN :now_us::bigint ELSE finished_us END
    WHERE id = (SELECT batch_id FROM ended)
)
INSERT INTO {schema}.part ({part_columns})
SELECT block_id, :span_id::bigint, :token::bigint, :part_no::bigint, :now_us::bigint,
    CASE WHEN positions IS NULL THEN :span_slots::bytea ELSE (
        SELECT string_agg(substring(positions FROM 2 * (kept_from + kept_count) + 1 FOR 2 * codes_count), ''::bytea)
        FROM (SELECT unnest(:kept_from::int[]) AS kept_from, unnest(:kept_count::int[]) AS kept_count,
            unnest(:codes_count::int[]) AS codes_count) AS stretches
    ) END,
    :codes::bytea, :results::bytea
FROM ended RETURNING 1;

-- settle_ended: settle runs of several leases that ended finally, with counters and completion: all of them or none
WITH given AS MATERIALIZED (
    SELECT (value->>0)::bigint AS id, (value->>1)::bigint AS token, (value->>2)::int AS runs_count,
        (value->>3)::int AS part_no, (value->>4)::int AS span_slot, (value->>5)::int AS is_whole,
        (value->>6)::int AS codes_at, (value->>7)::int AS results_at, (value->>8)::int AS results_length,
        (value->>9)::bigint AS completed, (value->>10)::bigint AS failed, (value->>11)::bigint AS cancelled,
        (value->>12)::bigint AS expired, (value->>13)::int AS mask_at, (value->>14)::int AS width
    FROM jsonb_array_elements(:rows::jsonb) AS rows (value)
),
locked AS MATERIALIZED (
    SELECT id, token, state, states, positions, dead_letter FROM {schema}.span
    WHERE id = ANY (ARRAY(SELECT id FROM given)) ORDER BY id FOR UPDATE
),
-- A repeat finds its runs settled. The script handles that call (R2, settlements are recognised when repeated).
-- States of consecutive runs are one piece. For other runs a mask holds the new states, and 0 for runs in between.
fenced AS MATERIALIZED (
    SELECT given.*, picked.after, picked.positions
    FROM given JOIN locked ON locked.id = given.id AND locked.token = given.token
    CROSS JOIN LATERAL (
        SELECT string_agg(substring(states FROM span_slot + number + 1 FOR 1), ''::bytea ORDER BY number)
                FILTER (WHERE get_byte(mask, number) > 0) AS before,
            string_agg(CASE get_byte(mask, number) WHEN 0 THEN substring(states FROM span_slot + number + 1 FOR 1)
                ELSE substring(mask FROM number + 1 FOR 1) END, ''::bytea ORDER BY number) AS after,
            string_agg(substring(coalesce(locked.positions, :span_slots::bytea) FROM 2 * (span_slot + number) + 1 FOR 2), ''::bytea
                ORDER BY number) FILTER (WHERE get_byte(mask, number) > 0) AS positions
        FROM substring(:blob::bytea FROM mask_at FOR width) AS mask, generate_series(0, width - 1) AS number
        WHERE mask_at > 0
    ) AS picked
    WHERE locked.state = 'leased' AND span_slot + width <= octet_length(states)
        AND (locked.dead_letter = 0 OR given.failed = 0)
        AND (is_whole = 0 OR runs_count = octet_length(states))
        AND btrim(coalesce(picked.before, substring(states FROM span_slot + 1 FOR runs_count)), 'ws'::bytea) = ''::bytea
),
-- Written and counted values come from the locked rows (R4, other tables are read after the lock).
ended AS (
    UPDATE {schema}.span SET unsettled_count = unsettled_count - fenced.runs_count,
        state = CASE unsettled_count WHEN fenced.runs_count THEN 'done' ELSE state END,
        session_id = CASE unsettled_count WHEN fenced.runs_count THEN '' ELSE session_id END,
        claim_no = CASE unsettled_count WHEN fenced.runs_count THEN 0 ELSE claim_no END,
        states = overlay(states PLACING coalesce(fenced.after,
            substring(:blob::bytea FROM fenced.codes_at FOR fenced.runs_count)) FROM fenced.span_slot + 1)
    FROM fenced
    WHERE span.id = fenced.id AND span.id = ANY (ARRAY(SELECT id FROM given))
        AND (SELECT count(*) FROM fenced) = (SELECT count(*) FROM given)
    RETURNING span.id, span.block_id, span.batch_id, fenced.token, fenced.part_no, fenced.runs_count, fenced.codes_at,
        fenced.results_at, fenced.results_length, fenced.completed, fenced.failed, fenced.cancelled, fenced.expired,
        CASE fenced.is_whole WHEN 1 THEN span.positions ELSE coalesce(fenced.positions, substring(
            coalesce(span.positions, :span_slots::bytea) FROM 2 * fenced.span_slot + 1 FOR 2 * fenced.runs_count)) END AS positions
),
counts AS MATERIALIZED (
    SELECT batch_id, sum(completed)::bigint AS completed, sum(failed)::bigint AS failed,
        sum(cancelled)::bigint AS cancelled, sum(expired)::bigint AS expired, sum(runs_count)::bigint AS settled
    FROM ended GROUP BY batch_id
),
locked_batches AS MATERIALIZED (
    SELECT id FROM {schema}.batch WHERE id = ANY (ARRAY(SELECT batch_id FROM counts)) ORDER BY id FOR UPDATE
),
counted AS (
    UPDATE {schema}.batch SET {outcome_counts(counts.)},
        state = CASE WHEN state = 'sealed' AND {ends_batch(counts.settled)} THEN 'completed' ELSE state END,
        finished_us = CASE WHEN {ends_batch(counts.settled)} THEN :now_us::bigint ELSE finished_us END
    FROM locked_batches JOIN counts ON counts.batch_id = locked_batches.id
    WHERE batch.id = locked_batches.id AND batch.id = ANY (ARRAY(SELECT batch_id FROM counts))
),
recorded AS (
    INSERT INTO {schema}.part ({part_columns})
    SELECT block_id, id, token, part_no, :now_us::bigint, positions, substring(:blob::bytea FROM codes_at FOR runs_count),
        substring(:blob::bytea FROM results_at FOR results_length)
    FROM ended
),
named AS (
    INSERT INTO {schema}.object (key, batch_id)
    SELECT value->>1, ended.batch_id
    FROM jsonb_array_elements(:objects::jsonb) AS objects (value) JOIN ended ON ended.id = (value->>0)::bigint
    ORDER BY 1
    ON CONFLICT DO NOTHING
)
SELECT count(*) FROM ended;

-- claim_whole: lease the first spans of some lanes to a live session, with their inputs, or report why it can't
WITH session AS MATERIALIZED (
    SELECT id FROM {schema}.session
    WHERE id = :session_id AND ended_us = 0 AND session.environment = :environment AND key_id = :key_id
    FOR KEY SHARE
),
-- A repeated claim returns the same spans (R1, claims are repeatable by number).
before AS MATERIALIZED (
    SELECT span.* FROM session JOIN {schema}.span ON span.session_id = session.id
    WHERE {leased(span.)} AND span.session_id = :session_id AND span.claim_no = :claim_no
),
due AS MATERIALIZED (
    SELECT 1 FROM {schema}.span WHERE state = 'delayed' AND due_us <= :due_us::bigint LIMIT 1
),
-- Each lane is read from the head of its index range, or from where the last claim stopped (R10, claims start at the
-- watermark of the queue).
lanes AS MATERIALIZED (
    SELECT lane.queue, lane.task, (:marks::jsonb->lane.queue->lane.task->>0)::bigint AS priority,
        (:marks::jsonb->lane.queue->lane.task->>1)::bigint AS mark
    FROM {schema}.lane JOIN {schema}.queue ON queue.environment = lane.environment AND queue.name = lane.queue
    WHERE lane.environment = :environment AND queue.paused = 0
        AND lane.task = ANY ({text_array(:tasks)})
        AND (:queues::jsonb IS NULL OR lane.queue = ANY ({text_array(:queues)}))
        AND starts_with(lane.queue, :queue_prefix)
        AND EXISTS (SELECT 1 FROM session) AND NOT EXISTS (SELECT 1 FROM before) AND NOT EXISTS (SELECT 1 FROM due)
),
found_from_the_end AS MATERIALIZED (
    SELECT best.* FROM lanes CROSS JOIN LATERAL (
        SELECT id, block_id, batch_id, queue, task, priority, order_no, first_index, unsettled_count, at_most_once, states
        FROM {schema}.span
        WHERE state = 'waiting' AND environment = :environment AND queue = lanes.queue AND task = lanes.task
            AND (expires_us = 0 OR expires_us > :now_us::bigint)
        ORDER BY {claim_order()} LIMIT :rows_max::bigint
        FOR UPDATE SKIP LOCKED
    ) AS best WHERE lanes.mark IS NULL
),
found_from_the_mark AS MATERIALIZED (
    SELECT best.* FROM lanes CROSS JOIN LATERAL (
        SELECT id, block_id, batch_id, queue, task, priority, order_no, first_index, unsettled_count, at_most_once, states
        FROM {schema}.span
        WHERE state = 'waiting' AND environment = :environment AND queue = lanes.queue AND task = lanes.task
            AND priority = lanes.priority AND order_no >= lanes.mark
            AND (expires_us = 0 OR expires_us > :now_us::bigint)
        ORDER BY order_no, batch_id, first_index, id LIMIT :rows_max::bigint
        FOR UPDATE SKIP LOCKED
    ) AS best WHERE lanes.mark IS NOT NULL
),
found AS MATERIALIZED (
    SELECT * FROM found_from_the_end UNION ALL SELECT * FROM found_from_the_mark
),
ranked AS MATERIALIZED (
    SELECT found.*, sum(unsettled_count) OVER (
        ORDER BY {claim_order()} ROWS UNBOUNDED PRECEDING)::bigint AS reached
    FROM found
),
wanted AS MATERIALIZED (
    SELECT id, block_id, batch_id, queue, order_no, at_most_once, reached,
        unsettled_count - greatest(reached - :runs_max::bigint, 0) AS taken_count,
        reached > :runs_max::bigint AS is_split, position('w'::bytea IN states) AS waiting_at,
        position('w'::bytea IN states) + unsettled_count = octet_length(states) + 1 AS is_tail
    FROM ranked WHERE reached - unsettled_count < :runs_max::bigint
),
-- The first of them whose blocks have at most so many bytes of inputs, at least one. Sizes are read without the inputs.
sized AS MATERIALIZED (
    SELECT wanted.*, sum((SELECT octet_length(items) + coalesce(octet_length(extras), 0) FROM {schema}.block
        WHERE block.id = wanted.block_id)) OVER (ORDER BY reached) AS reached_bytes
    FROM wanted
),
chosen AS MATERIALIZED (
    SELECT * FROM sized
    WHERE reached_bytes <= :bytes_max::bigint OR reached = (SELECT min(reached) FROM wanted)
),
-- Of spans with a higher priority than the cursor it only matters whether there is one.
higher AS MATERIALIZED (
    SELECT (SELECT true FROM {schema}.span WHERE state = 'waiting' AND environment = :environment AND queue = lanes.queue
        AND task = lanes.task AND priority > lanes.priority LIMIT 1) AS waits
    FROM lanes WHERE lanes.mark IS NOT NULL
),
verdict AS MATERIALIZED (
    SELECT CASE
        WHEN NOT EXISTS (SELECT 1 FROM session) THEN 'ended'
        WHEN EXISTS (SELECT 1 FROM before) THEN 'again'
        WHEN EXISTS (SELECT 1 FROM due) THEN 'due'
        WHEN :marks::jsonb <> '{}' AND ((SELECT coalesce(max(reached), 0) FROM ranked) < :runs_max::bigint
            OR EXISTS (SELECT 1 FROM higher WHERE waits)) THEN 'below'
        WHEN EXISTS (SELECT 1 FROM chosen WHERE at_most_once <> 0 OR is_split AND NOT is_tail) THEN 'special'
        WHEN EXISTS (SELECT 1 FROM {schema}.batch WHERE id = ANY (ARRAY(SELECT batch_id FROM chosen))
            AND state IN ('cancelled', 'abandoned')) THEN 'stopped'
        -- Behind the last row that was read of a lane, a span may wait that comes before those of another lane.
        WHEN :rows_max::bigint < 1000 AND EXISTS (SELECT 1 FROM ranked GROUP BY queue, task
            HAVING count(*) >= :rows_max::bigint AND max(reached) < :runs_max::bigint) THEN 'short'
        ELSE 'claimed' END AS word
),
leased AS (
    UPDATE {schema}.span SET state = 'leased', session_id = :session_id, claim_no = :claim_no, token = span.token + 1,
        leased_us = :now_us::bigint
    FROM chosen
    WHERE span.id = chosen.id AND span.id = ANY (ARRAY(SELECT id FROM chosen WHERE NOT is_split))
        AND (SELECT word FROM verdict) = 'claimed'
    RETURNING span.*
),
-- A small claim: the first waiting runs leave their span, and the others stay claimable.
kept AS (
    UPDATE {schema}.span SET unsettled_count = span.unsettled_count - chosen.taken_count,
        states = overlay(span.states PLACING convert_to(repeat('m', chosen.taken_count::int), 'UTF8') FROM chosen.waiting_at)
    FROM chosen
    WHERE span.id = chosen.id AND span.id = ANY (ARRAY(SELECT id FROM chosen WHERE is_split))
        AND (SELECT word FROM verdict) = 'claimed'
    RETURNING span.*, chosen.taken_count, chosen.waiting_at
),
taken AS (
    INSERT INTO {schema}.span ({span_columns()})
    SELECT :span_id::bigint, block_id, batch_id, environment, queue, task, priority, due_us, expires_us, at_most_once, order_no,
        first_index, attempt, crashes_count, crashes_alone_count,
        substring(coalesce(positions, :span_slots::bytea) FROM 2 * waiting_at - 1 FOR 2 * taken_count::int),
        convert_to(repeat('w', taken_count::int), 'UTF8'), taken_count, 'leased', :session_id, :claim_no,
        token + 1, dead_letter, note, since_us, :now_us::bigint
    FROM kept
    RETURNING span.*
),
-- The clock advances to the claimed order number, in steps. A claim that finds it locked leaves it to the next claim.
reached_clocks AS MATERIALIZED (
    SELECT queue, max(order_no) / :clock_step::bigint * :clock_step::bigint AS order_no FROM chosen WHERE (SELECT word FROM verdict) = 'claimed' GROUP BY queue
),
free_queues AS MATERIALIZED (
    SELECT name, clock FROM {schema}.queue
    WHERE environment = :environment AND name = ANY (ARRAY(SELECT queue FROM reached_clocks))
    FOR NO KEY UPDATE SKIP LOCKED
),
advanced AS (
    UPDATE {schema}.queue SET clock = reached_clocks.order_no
    FROM reached_clocks JOIN free_queues ON free_queues.name = reached_clocks.queue
    WHERE queue.environment = :environment AND queue.name = free_queues.name
        AND free_queues.clock < reached_clocks.order_no
),
held AS (
    SELECT * FROM before UNION ALL SELECT * FROM leased UNION ALL SELECT * FROM taken
)
SELECT verdict.word, (SELECT count(*) FROM wanted) > (SELECT count(*) FROM chosen) AS is_cut, {span_columns(held.)}, block.id, block.first_index, block.gaps, block.extras, block.items
FROM verdict LEFT JOIN (held JOIN {schema}.block ON block.id = held.block_id) ON true
ORDER BY {claim_order(held.)};

-- append_in_order: append consecutive runs that follow all received runs of a batch, with its cursor, or nothing
WITH open_batch AS MATERIALIZED (
    SELECT id, environment, order_bases::jsonb AS order_bases FROM {schema}.batch
    WHERE id = :batch_id AND state = 'open' AND received = :received_before::bytea
        AND :last_index::bigint < CASE WHEN expected_count IS NULL OR kind = 'stream' THEN :runs_max::bigint ELSE expected_count END
    FOR UPDATE
),
-- A queue that the batch has not used, or a lane that was never used, is left to the script.
lanes AS MATERIALIZED (
    SELECT lane.queue, lane.task, (order_bases->>lane.queue)::bigint AS base
    FROM open_batch CROSS JOIN jsonb_array_elements(:lanes::jsonb) AS given (value)
    JOIN {schema}.lane ON lane.environment = open_batch.environment AND lane.queue = value->>0 AND lane.task = value->>1
    WHERE order_bases->lane.queue IS NOT NULL
),
fit AS MATERIALIZED (
    SELECT id, environment,
        (SELECT coalesce(max(clock), 0) FROM {schema}.queue WHERE queue.environment = open_batch.environment) AS clock
    FROM open_batch WHERE (SELECT count(*) FROM lanes) = jsonb_array_length(:lanes::jsonb)
),
blocks AS (
    INSERT INTO {schema}.block (id, batch_id, first_index, last_index, runs_count, items)
    SELECT :block_id::bigint + (value->>0)::bigint, fit.id, (value->>1)::bigint, (value->>1)::bigint + (value->>2)::bigint - 1,
        (value->>2)::bigint, substring(:blob::bytea FROM (value->>3)::int FOR (value->>4)::int)
    FROM fit CROSS JOIN jsonb_array_elements(:blocks::jsonb) AS given (value)
    RETURNING runs_count
),
spans AS (
    INSERT INTO {schema}.span ({span_columns()})
    SELECT :span_id::bigint + (value->>0)::bigint, :block_id::bigint + (value->>1)::bigint, fit.id, fit.environment,
        lanes.queue, lanes.task, (value->>4)::bigint, (value->>5)::bigint, (value->>6)::bigint, (value->>7)::bigint,
        greatest(fit.clock, lanes.base + (value->>8)::bigint), (value->>9)::bigint, 1, 0, 0,
        CASE WHEN (value->>12)::int >= 0 THEN substring(:blob::bytea FROM (value->>11)::int FOR (value->>12)::int) END,
        convert_to(repeat('w', (value->>10)::int), 'UTF8'), (value->>10)::bigint,
        CASE WHEN (value->>5)::bigint > :now_us::bigint THEN 'delayed' ELSE 'waiting' END, '', 0, 0,
        (value->>13)::bigint, '', :now_us::bigint, 0
    FROM fit CROSS JOIN jsonb_array_elements(:spans::jsonb) AS given (value)
    JOIN lanes ON lanes.queue = value->>2 AND lanes.task = value->>3
),
counted AS (
    UPDATE {schema}.batch SET received_count = received_count + :runs_count::bigint, received = :received::bytea,
        block_width = greatest(block_width, :block_width::bigint), appended_us = :now_us::bigint,
        cursor = coalesce(:cursor::bytea, cursor)
    FROM fit WHERE batch.id = fit.id AND batch.id = :batch_id
)
SELECT coalesce(sum(runs_count), 0)::bigint FROM blocks;
