-- live_session: check that a session of an owner exists and has not ended; a null owner is any
SELECT 1 FROM {schema}.session WHERE id = :id AND ended_us = 0
    AND environment = coalesce(:environment, environment) AND key_id = coalesce(:key_id, key_id)
FOR KEY SHARE;

-- owned_session: check that a session of an owner exists and has not ended, in a transaction that only reads
SELECT 1 FROM {schema}.session WHERE id = :id AND ended_us = 0 AND environment = :environment AND key_id = :key_id;

-- claimed_before: read the spans of a claim that is repeated, in claim order
SELECT {span_columns()}
FROM {schema}.span WHERE {leased()} AND session_id = :session_id AND claim_no = :claim_no
ORDER BY {claim_order()};

-- due_spans: read delayed spans that are due, with the clock of their queue
SELECT span.id, queue.clock
FROM {schema}.span JOIN {schema}.queue ON queue.environment = span.environment AND queue.name = span.queue
WHERE span.state = 'delayed' AND span.due_us <= :now_us ORDER BY span.due_us LIMIT :rows_max
FOR UPDATE OF span SKIP LOCKED;

-- promote_spans: make delayed spans claimable, at the current clock of their queue
UPDATE {schema}.span SET state = 'waiting', order_no = (value->>1)::bigint
FROM jsonb_array_elements(:rows::jsonb) AS given (value)
WHERE span.id = (value->>0)::bigint
    AND span.id = ANY (ARRAY(SELECT (value->>0)::bigint FROM jsonb_array_elements(:rows::jsonb) AS given (value)));

-- open_lanes: list the lanes of the requested tasks and queues that are not paused
SELECT lane.queue, lane.task
FROM {schema}.lane JOIN {schema}.queue ON queue.environment = lane.environment AND queue.name = lane.queue
WHERE lane.environment = :environment AND queue.paused = 0
    AND lane.task = ANY ({text_array(:tasks)})
    AND (:queues::jsonb IS NULL OR lane.queue = ANY ({text_array(:queues)}))
    AND starts_with(lane.queue, :queue_prefix);

-- claim_candidates: read the first waiting spans of one lane, in claim order
SELECT {span_columns()}
FROM {schema}.span
WHERE state = 'waiting' AND environment = :environment AND queue = :queue AND task = :task
    AND (expires_us = 0 OR expires_us > :now_us)
ORDER BY {claim_order()} LIMIT :rows_max
FOR UPDATE SKIP LOCKED;

-- blocks: read the inputs of some blocks
SELECT id, first_index, gaps, extras, items FROM {schema}.block WHERE id = ANY ({bigint_array(:ids)});

-- sizes_of_blocks: read how many bytes the inputs of some blocks have, without reading the inputs
SELECT id, octet_length(items) + coalesce(octet_length(extras), 0) FROM {schema}.block WHERE id = ANY ({bigint_array(:ids)});

-- lock_spans: lock some spans, in id order
SELECT {span_columns()}
FROM {schema}.span WHERE id = ANY ({bigint_array(:ids)})
ORDER BY id FOR UPDATE;

-- recorded_part: check whether a settlement was recorded before
SELECT 1 FROM {schema}.part WHERE block_id = :block_id AND span_id = :span_id AND token = :token AND part_no = :part_no;

-- lock_spans_of_session: lock the spans that a session has leased
SELECT {span_columns()}
FROM {schema}.span WHERE {leased()} AND session_id = :session_id ORDER BY id
FOR UPDATE;

-- leases_of_session: list the leases of a session, for it to compare with its memory
SELECT id, token, claim_no, batch_id FROM {schema}.span WHERE {leased()} AND session_id = :session_id;

-- stopped_batches: read which of some batches are cancelled or abandoned
SELECT id FROM {schema}.batch WHERE id = ANY ({text_array(:ids)}) AND state IN ('cancelled', 'abandoned');

-- has_unwanted_runs: check whether a session has leased runs of a stopped batch, or of one with cancelled runs
SELECT 1 FROM {schema}.batch WHERE state IN ('cancelled', 'abandoned')
    AND id = ANY (ARRAY(SELECT DISTINCT batch_id FROM {schema}.span WHERE {leased()} AND session_id = :session_id))
UNION ALL
SELECT 1 FROM {schema}.cancellation
WHERE batch_id = ANY (ARRAY(SELECT DISTINCT batch_id FROM {schema}.span WHERE {leased()} AND session_id = :session_id))
LIMIT 1;

-- cancellations: list the single runs of some batches that are to be cancelled
SELECT batch_id, run_index FROM {schema}.cancellation WHERE batch_id = ANY ({text_array(:ids)}) LIMIT :rows_max;

-- clocks: read the clocks of some queues
SELECT name, clock FROM {schema}.queue WHERE environment = :environment AND name = ANY ({text_array(:names)});

-- environment_clock: read the highest clock of an environment's queues: the virtual time of new runs
SELECT coalesce(max(clock), 0) FROM {schema}.queue WHERE environment = :environment;

-- unsettled_spans_of_batch: read a bounded number of waiting or delayed spans of a batch
SELECT {span_columns()}
FROM {schema}.span WHERE batch_id = :batch_id AND state IN ('waiting', 'delayed') LIMIT :rows_max
FOR UPDATE SKIP LOCKED;

-- expired_spans: read a bounded number of spans that were not started before their expiry
SELECT {span_columns()}
FROM {schema}.span WHERE expires_us > 0 AND state IN ('waiting', 'delayed') AND expires_us <= :now_us LIMIT :rows_max
FOR UPDATE SKIP LOCKED;

-- leases_without_session: read leased spans whose session has ended or does not exist
SELECT {span_columns()}
FROM {schema}.span
WHERE {leased(span.)} AND NOT EXISTS (SELECT 1 FROM {schema}.session WHERE session.id = span.session_id AND session.ended_us = 0)
LIMIT :rows_max
FOR UPDATE SKIP LOCKED;

-- spans_of_block: read all spans over one block
SELECT {span_columns()}
FROM {schema}.span WHERE block_id = :block_id ORDER BY id;

-- lock_spans_of_block: lock all spans over one block
SELECT {span_columns()}
FROM {schema}.span WHERE block_id = :block_id ORDER BY id
FOR UPDATE;

-- spans_with_state: read spans of a batch that have a run in a state
SELECT {span_columns()}
FROM {schema}.span
WHERE id = ANY (ARRAY(
        SELECT own.id FROM {schema}.block CROSS JOIN LATERAL (
            SELECT id FROM {schema}.span
            WHERE block_id = block.id AND position(:state::bytea IN states) > 0 AND id > :after_id OFFSET 0
        ) AS own
        WHERE block.batch_id = :batch_id ORDER BY own.id LIMIT :rows_max
    )) AND position(:state::bytea IN states) > 0
ORDER BY id FOR UPDATE;
