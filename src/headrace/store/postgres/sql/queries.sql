-- batch: one batch by id
SELECT {batch_columns}
FROM {schema}.batch WHERE id = :id;

-- lock_batch: one batch that this transaction is about to change
SELECT {batch_columns}
FROM {schema}.batch WHERE id = :id
FOR UPDATE;

-- lock_batches: some batches that this transaction is about to change, in one order
SELECT {batch_columns}
FROM {schema}.batch WHERE id = ANY ({text_array(:ids)})
ORDER BY id FOR UPDATE;

-- batch_by_key: the batch that a key names
SELECT {batch_columns}
FROM {schema}.batch WHERE environment = :environment AND key = :key;

-- lock_streams_of_session: streams that a session owns and batches of which it has leases, about to be changed
SELECT {batch_columns}
FROM {schema}.batch WHERE session_id = :session_id AND session_id <> '' AND state = 'open'
    OR id = ANY (ARRAY(SELECT batch_id FROM {schema}.span WHERE span.state = 'leased' AND span.session_id = :session_id))
ORDER BY id FOR UPDATE;

-- list_batches: batches of an environment, newest first
SELECT {batch_columns}
FROM {schema}.batch
WHERE environment = :environment AND (:before_id::text = '' OR id < :before_id)
    AND (:states::jsonb IS NULL OR state = ANY ({text_array(:states)}))
ORDER BY id DESC LIMIT :rows_max;

-- open_batches: batches that take items, for their seal deadline
SELECT {batch_columns}
FROM {schema}.batch WHERE state = 'open' AND finished_us = 0 AND state IN ('open', 'cancelled', 'abandoned') AND seal_timeout_ms > 0
    AND greatest(created_us, appended_us) + seal_timeout_ms * 1000 <= :now_us LIMIT :rows_max;

-- stopping_batches: cancelled and abandoned batches that have not ended
SELECT id FROM {schema}.batch WHERE state IN ('cancelled', 'abandoned') AND finished_us = 0
    AND state IN ('open', 'cancelled', 'abandoned');

-- finished_batches: batches that ended before a moment, and of which nobody has to look at anything
SELECT id, environment FROM {schema}.batch WHERE finished_us > 0 AND finished_us <= :before_us
    AND NOT EXISTS (SELECT 1 FROM {schema}.dead_letter WHERE dead_letter.batch_id = batch.id)
ORDER BY finished_us LIMIT :rows_max;

-- received: the set of indexes a batch has received
SELECT received FROM {schema}.batch WHERE id = :id;

-- leased_count: how many runs of a batch are leased
SELECT coalesce(sum(unsettled_count), 0)::bigint FROM {schema}.span
WHERE batch_id = :batch_id AND state = 'leased';

-- blocks_from: the blocks that may hold an index or those after it, by first index
SELECT id, first_index, last_index, runs_count, gaps FROM {schema}.block
WHERE batch_id = :batch_id AND first_index > :after_index AND first_index < :before_index
    AND last_index >= :from_index
ORDER BY first_index, id LIMIT :rows_max;

-- shapes_of_blocks: which indexes some blocks hold
SELECT id, first_index, runs_count, gaps FROM {schema}.block WHERE id = ANY ({bigint_array(:ids)});

-- extras_of_blocks: what only some runs of some blocks have
SELECT id, extras FROM {schema}.block
WHERE extras IS NOT NULL AND id = ANY ({bigint_array(:ids)});

-- states_of_blocks: how the runs of some blocks stand
SELECT block_id, positions, states FROM {schema}.span WHERE block_id = ANY ({bigint_array(:ids)}) ORDER BY id;

-- parts_of_blocks: the recorded outcomes of some blocks, oldest first
SELECT {part_columns} FROM {schema}.part
WHERE block_id = ANY ({bigint_array(:ids)}) ORDER BY id;

-- sessions: the sessions that have not ended
SELECT id, kind, host, pid, started_us, heartbeat_us, ended_us FROM {schema}.session WHERE ended_us = 0 ORDER BY id;

-- duties: when each duty of upkeep is free to be taken
SELECT name, free_us FROM {schema}.duty;

-- clock: the time of the database's machine, which all hosts follow
SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;

-- known_keys: the runs that some idempotency keys name and that have not expired
SELECT idempotency.task, idempotency.key, idempotency.batch_id, idempotency.run_index
FROM jsonb_array_elements(:rows::jsonb) AS wanted (value)
CROSS JOIN LATERAL (
    SELECT task, key, batch_id, run_index, expires_us FROM {schema}.idempotency
    WHERE environment = :environment AND task = wanted.value->>0 AND key = wanted.value->>1 LIMIT 1
) AS idempotency
WHERE idempotency.expires_us = 0 OR idempotency.expires_us > :now_us;

-- list_queues: queues with what stands in them, from unsettled spans only
SELECT queue.name, queue.paused,
    coalesce(sum(CASE WHEN span.state = 'waiting' THEN span.unsettled_count END), 0)::bigint,
    coalesce(sum(CASE WHEN span.state = 'delayed' THEN span.unsettled_count END), 0)::bigint,
    coalesce(sum(CASE WHEN span.state = 'leased' THEN span.unsettled_count END), 0)::bigint,
    coalesce(min(CASE WHEN span.state = 'waiting' THEN greatest(span.since_us, span.due_us) END), 0)
FROM {schema}.queue
LEFT JOIN {schema}.span ON span.state <> 'done' AND span.environment = queue.environment AND span.queue = queue.name
WHERE queue.environment = :environment
GROUP BY queue.name, queue.paused ORDER BY queue.name;

-- list_spans: spans that may hold runs a person asks for, newest batch first
SELECT {span_columns(span.)}, block.first_index, block.gaps
FROM {schema}.batch JOIN {schema}.block ON block.batch_id = batch.id JOIN {schema}.span ON span.block_id = block.id
WHERE batch.environment = :environment AND (:batch_id::text = '' OR batch.id = :batch_id)
    AND (:task::text = '' OR span.task = :task) AND (:state::bytea IS NULL OR position(:state::bytea IN span.states) > 0)
    AND (:span_state::text = '' OR span.state = :span_state)
    AND (:after_batch::text = '' OR batch.id < :after_batch OR batch.id = :after_batch AND block.last_index > :after_index)
ORDER BY batch.id DESC, block.first_index, span.id LIMIT :rows_max;

-- tagged_runs: the runs that carry a tag
SELECT batch_id, run_index FROM {schema}.tag
WHERE environment = :environment AND tag = :tag AND (:batch_id::text = '' OR batch_id = :batch_id)
    AND (:after_batch::text = '' OR batch_id < :after_batch OR batch_id = :after_batch AND run_index > :after_index)
ORDER BY batch_id DESC, run_index LIMIT :rows_max;

-- named_objects: which of some object keys a row names
SELECT key FROM {schema}.object WHERE key = ANY ({text_array(:keys)});

-- next_due: when the next delayed span of some tasks becomes claimable
SELECT min(due_us) FROM {schema}.span WHERE state = 'delayed' AND environment = :environment
    AND task = ANY ({text_array(:tasks)});

-- blocks_of_batch: the shape of a batch's blocks, for counting it anew
SELECT id, first_index, runs_count, gaps FROM {schema}.block WHERE batch_id = :batch_id AND id > :after_id ORDER BY id LIMIT :rows_max;

-- spans_of_blocks: all spans over some blocks
SELECT {span_columns()}
FROM {schema}.span WHERE block_id = ANY ({bigint_array(:ids)}) ORDER BY id;
