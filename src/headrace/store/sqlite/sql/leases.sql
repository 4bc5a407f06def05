-- live_session: whether a session is known and has not ended
SELECT 1 FROM session WHERE id = :id AND ended_us = 0;

-- claimed_before: the spans of a claim that is asked for again, in claim order
SELECT {span_columns()}
FROM span WHERE state = 'leased' AND session_id = :session_id AND claim_no = :claim_no
ORDER BY {claim_order()};

-- due_spans: delayed spans whose time has come, with their queue's clock
SELECT span.id, queue.clock
FROM span JOIN queue ON queue.environment = span.environment AND queue.name = span.queue
WHERE span.state = 'delayed' AND span.due_us <= :now_us ORDER BY span.due_us LIMIT :rows_max;

-- promote_spans: delayed spans join the line at the clock of this moment
UPDATE span SET state = 'waiting', order_no = fresh.order_no
FROM (SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS order_no FROM json_each(:rows)) AS fresh
WHERE span.id = fresh.id AND span.state = 'delayed';

-- open_lanes: the lanes of the wanted tasks and queues that are not paused
SELECT lane.queue, lane.task
FROM lane JOIN queue ON queue.environment = lane.environment AND queue.name = lane.queue
WHERE lane.environment = :environment AND queue.paused = 0
    AND lane.task IN (SELECT value FROM json_each(:tasks))
    AND (:queues IS NULL OR lane.queue IN (SELECT value FROM json_each(:queues)))
    AND substr(lane.queue, 1, length(:queue_prefix)) = :queue_prefix;

-- claim_candidates: the best waiting spans of one lane, in claim order
SELECT {span_columns()}
FROM span
WHERE state = 'waiting' AND environment = :environment AND queue = :queue AND task = :task
    AND (expires_us = 0 OR expires_us > :now_us)
ORDER BY {claim_order()} LIMIT :rows_max;

-- blocks: the inputs of some blocks
SELECT id, first_index, gaps, extras, items FROM block WHERE id IN (SELECT value FROM json_each(:ids));

-- lock_spans: some spans that this transaction is about to change, in one order
SELECT {span_columns()}
FROM span WHERE id IN (SELECT value FROM json_each(:ids));

-- recorded_part: whether a settlement was recorded before
SELECT 1 FROM part WHERE block_id = :block_id AND span_id = :span_id AND token = :token AND part_no = :part_no;

-- lock_spans_of_session: what a session has leased, about to be changed
SELECT {span_columns()}
FROM span WHERE state = 'leased' AND session_id = :session_id ORDER BY id;

-- leases_of_session: what a session has leased, for it to compare with its memory
SELECT id, token, claim_no, batch_id FROM span WHERE state = 'leased' AND session_id = :session_id;

-- stopped_batches: those of some batches of which nothing may start
SELECT id FROM batch WHERE id IN (SELECT value FROM json_each(:ids)) AND state IN ('cancelled', 'abandoned');

-- cancellations: the single runs of some batches that someone asked to cancel
SELECT batch_id, run_index FROM cancellation WHERE batch_id IN (SELECT value FROM json_each(:ids)) LIMIT :rows_max;

-- clocks: the clocks of an environment's queues
SELECT name, clock FROM queue WHERE environment = :environment AND name IN (SELECT value FROM json_each(:names));

-- environment_clock: the furthest clock of an environment's queues: what time it is for new runs
SELECT coalesce(max(clock), 0) FROM queue WHERE environment = :environment;

-- unsettled_spans_of_batch: spans of a batch in one state, bounded
SELECT {span_columns()}
FROM span WHERE batch_id = :batch_id AND state IN ('waiting', 'delayed') AND state <> 'done' LIMIT :rows_max;

-- expired_spans: spans that did not start in time, bounded
SELECT {span_columns()}
FROM span WHERE expires_us > 0 AND state IN ('waiting', 'delayed') AND expires_us <= :now_us LIMIT :rows_max;

-- leases_without_session: leased spans whose session ended or is gone
SELECT {span_columns()}
FROM span
WHERE span.state = 'leased' AND NOT EXISTS (SELECT 1 FROM session WHERE session.id = span.session_id AND session.ended_us = 0)
LIMIT :rows_max;

-- spans_of_block: all spans over one block
SELECT {span_columns()}
FROM span WHERE block_id = :block_id ORDER BY id;

-- lock_spans_of_block: all spans over one block, about to be changed
SELECT {span_columns()}
FROM span WHERE block_id = :block_id ORDER BY id;

-- spans_with_state: spans of a batch of which some run ended in a state
SELECT {span_columns()}
FROM span
WHERE block_id IN (SELECT id FROM block WHERE batch_id = :batch_id) AND instr(states, :state) > 0
    AND id > :after_id ORDER BY id LIMIT :rows_max;
