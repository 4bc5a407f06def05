-- live_session: check that a session of an owner exists and has not ended; a null owner is any
SELECT 1 FROM headrace_session WHERE id = :id AND ended_us = 0
    AND environment = coalesce(:environment, environment) AND key_id = coalesce(:key_id, key_id);

-- owned_session: check that a session of an owner exists and has not ended, in a transaction that only reads
SELECT 1 FROM headrace_session WHERE id = :id AND ended_us = 0 AND environment = :environment AND key_id = :key_id;

-- claimed_before: read the spans of a claim that is repeated, in claim order
SELECT {span_columns()}
FROM headrace_span WHERE state = 'leased' AND session_id = :session_id AND claim_no = :claim_no
ORDER BY {claim_order()};

-- due_spans: read delayed spans that are due, with the clock of their queue
SELECT span.id, queue.clock
FROM headrace_span AS span JOIN headrace_queue AS queue ON queue.environment = span.environment AND queue.name = span.queue
WHERE span.state = 'delayed' AND span.due_us <= :now_us ORDER BY span.due_us LIMIT :rows_max;

-- promote_spans: make delayed spans claimable, at the current clock of their queue
UPDATE headrace_span AS span SET state = 'waiting', order_no = fresh.order_no
FROM (SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS order_no FROM json_each(:rows)) AS fresh
WHERE span.id = fresh.id AND span.state = 'delayed';

-- open_lanes: list the lanes of the requested tasks and queues that are not paused
SELECT lane.queue, lane.task
FROM headrace_lane AS lane JOIN headrace_queue AS queue ON queue.environment = lane.environment AND queue.name = lane.queue
WHERE lane.environment = :environment AND queue.paused = 0
    AND lane.task IN (SELECT value FROM json_each(:tasks))
    AND (:queues IS NULL OR lane.queue IN (SELECT value FROM json_each(:queues)))
    AND substr(lane.queue, 1, length(:queue_prefix)) = :queue_prefix;

-- claim_candidates: read the first waiting spans of one lane, in claim order
SELECT {span_columns()}
FROM headrace_span
WHERE state = 'waiting' AND environment = :environment AND queue = :queue AND task = :task
    AND (expires_us = 0 OR expires_us > :now_us)
ORDER BY {claim_order()} LIMIT :rows_max;

-- blocks: read the inputs of some blocks
SELECT id, first_index, gaps, extras, items FROM headrace_block WHERE id IN (SELECT value FROM json_each(:ids));

-- sizes_of_blocks: read how many bytes the inputs of some blocks have, without reading the inputs
SELECT id, length(items) + coalesce(length(extras), 0) FROM headrace_block WHERE id IN (SELECT value FROM json_each(:ids));

-- lock_spans: lock some spans, in id order
SELECT {span_columns()}
FROM headrace_span WHERE id IN (SELECT value FROM json_each(:ids));

-- recorded_part: check whether a settlement was recorded before
SELECT 1 FROM headrace_part WHERE block_id = :block_id AND span_id = :span_id AND token = :token AND part_no = :part_no;

-- lock_spans_of_session: lock the spans that a session has leased
SELECT {span_columns()}
FROM headrace_span WHERE state = 'leased' AND session_id = :session_id ORDER BY id;

-- leases_of_session: list the leases of a session, for it to compare with its memory
SELECT id, token, claim_no, batch_id FROM headrace_span WHERE state = 'leased' AND session_id = :session_id;

-- stopped_batches: read which of some batches are cancelled or abandoned
SELECT id FROM headrace_batch WHERE id IN (SELECT value FROM json_each(:ids)) AND state IN ('cancelled', 'abandoned');

-- has_unwanted_runs: check whether a session has leased runs of a stopped batch, or of one with cancelled runs
SELECT 1 FROM headrace_batch WHERE state IN ('cancelled', 'abandoned')
    AND id IN (SELECT DISTINCT batch_id FROM headrace_span WHERE state = 'leased' AND session_id = :session_id)
UNION ALL
SELECT 1 FROM headrace_cancellation
WHERE batch_id IN (SELECT DISTINCT batch_id FROM headrace_span WHERE state = 'leased' AND session_id = :session_id)
LIMIT 1;

-- cancellations: list the single runs of some batches that are to be cancelled
SELECT batch_id, run_index FROM headrace_cancellation WHERE batch_id IN (SELECT value FROM json_each(:ids)) LIMIT :rows_max;

-- clocks: read the clocks of some queues
SELECT name, clock FROM headrace_queue WHERE environment = :environment AND name IN (SELECT value FROM json_each(:names));

-- environment_clock: read the highest clock of an environment's queues: the virtual time of new runs
SELECT coalesce(max(clock), 0) FROM headrace_queue WHERE environment = :environment;

-- unsettled_spans_of_batch: read a bounded number of waiting or delayed spans of a batch
SELECT {span_columns()}
FROM headrace_span WHERE batch_id = :batch_id AND state IN ('waiting', 'delayed') AND state <> 'done' LIMIT :rows_max;

-- expired_spans: read a bounded number of spans that were not started before their expiry
SELECT {span_columns()}
FROM headrace_span WHERE expires_us > 0 AND state IN ('waiting', 'delayed') AND expires_us <= :now_us LIMIT :rows_max;

-- leases_without_session: read leased spans whose session has ended or does not exist
SELECT {span_columns()}
FROM headrace_span AS span
WHERE span.state = 'leased' AND NOT EXISTS (SELECT 1 FROM headrace_session AS session WHERE session.id = span.session_id AND session.ended_us = 0)
LIMIT :rows_max;

-- spans_of_block: read all spans over one block
SELECT {span_columns()}
FROM headrace_span WHERE block_id = :block_id ORDER BY id;

-- lock_spans_of_block: lock all spans over one block
SELECT {span_columns()}
FROM headrace_span WHERE block_id = :block_id ORDER BY id;

-- spans_with_state: read spans of a batch that have a run in a state
SELECT {span_columns()}
FROM headrace_span
WHERE block_id IN (SELECT id FROM headrace_block WHERE batch_id = :batch_id) AND instr(states, :state) > 0
    AND id > :after_id ORDER BY id LIMIT :rows_max;
