-- batch: read a batch by id
SELECT {batch_columns}
FROM {schema}.batch WHERE id = :id;

-- lock_batch: lock a batch
SELECT {batch_columns}
FROM {schema}.batch WHERE id = :id
FOR UPDATE;

-- lock_batches: lock some batches, in id order
SELECT {batch_columns}
FROM {schema}.batch WHERE id = ANY ({text_array(:ids)})
ORDER BY id FOR UPDATE;

-- batch_by_key: read the batch that a key names
SELECT {batch_columns}
FROM {schema}.batch WHERE environment = :environment AND key = :key;

-- lock_streams_of_session: lock the open streams of a session, and the batches of its leases
SELECT {batch_columns}
FROM {schema}.batch WHERE session_id = :session_id AND session_id <> '' AND state = 'open'
    OR id = ANY (ARRAY(SELECT batch_id FROM {schema}.span WHERE {leased(span.)} AND span.session_id = :session_id))
ORDER BY id FOR UPDATE;

-- list_batches: list batches of an environment, newest first
SELECT {batch_columns}
FROM {schema}.batch
WHERE environment = :environment AND (:before_id::text = '' OR id < :before_id)
    AND (:states::jsonb IS NULL OR state = ANY ({text_array(:states)}))
ORDER BY id DESC LIMIT :rows_max;

-- open_batches: read open batches that are past their seal deadline
SELECT {batch_columns}
FROM {schema}.batch WHERE state = 'open' AND finished_us = 0 AND state IN ('open', 'cancelled', 'abandoned') AND seal_timeout_ms > 0
    AND greatest(created_us, appended_us) + seal_timeout_ms * 1000 <= :now_us LIMIT :rows_max;

-- stopping_batches: list cancelled and abandoned batches that have not ended
SELECT id FROM {schema}.batch WHERE state IN ('cancelled', 'abandoned') AND finished_us = 0
    AND state IN ('open', 'cancelled', 'abandoned');

-- finished_batches: list batches that ended before a time and have no dead letter
SELECT id, environment FROM {schema}.batch WHERE finished_us > 0 AND finished_us <= :before_us
    AND NOT EXISTS (SELECT 1 FROM {schema}.dead_letter WHERE dead_letter.batch_id = batch.id)
ORDER BY finished_us LIMIT :rows_max;

-- received: read the set of indexes that a batch has received
SELECT received FROM {schema}.batch WHERE id = :id;

-- leased_count: count the leased runs of a batch
SELECT coalesce(sum(unsettled_count), 0)::bigint FROM {schema}.span
WHERE batch_id = :batch_id AND state = 'leased';

-- blocks_from: read blocks that may hold an index or later ones, by first index
SELECT id, first_index, last_index, runs_count, gaps FROM {schema}.block
WHERE batch_id = :batch_id AND first_index > :after_index AND first_index < :before_index
    AND last_index >= :from_index
ORDER BY first_index, id LIMIT :rows_max;

-- first_blocks: read the ids of a bounded number of blocks of some batches
SELECT id FROM {schema}.block WHERE batch_id = ANY ({text_array(:ids)}) LIMIT :rows_max;

-- shapes_of_blocks: read which indexes some blocks hold
SELECT id, first_index, runs_count, gaps FROM {schema}.block WHERE id = ANY ({bigint_array(:ids)});

-- extras_of_blocks: read what only some runs of some blocks have
SELECT id, extras FROM {schema}.block
WHERE extras IS NOT NULL AND id = ANY ({bigint_array(:ids)});

-- states_of_blocks: read the states of the runs of some blocks, with the size of all results of these blocks
SELECT block_id, positions, states,
    (SELECT coalesce(sum(octet_length(results)), 0)::bigint FROM {schema}.part WHERE block_id = ANY ({bigint_array(:ids)}))
FROM {schema}.span WHERE block_id = ANY ({bigint_array(:ids)}) ORDER BY id;

-- parts_of_blocks: read the recorded outcomes of some blocks, oldest first
SELECT {part_columns} FROM {schema}.part
WHERE block_id = ANY ({bigint_array(:ids)}) ORDER BY id;

-- shapes_of_parts: read which outcomes some blocks have, oldest first, with the sizes of their results
SELECT id, block_id, settled_us, positions, codes, octet_length(results) FROM {schema}.part
WHERE block_id = ANY ({bigint_array(:ids)}) ORDER BY id;

-- parts_by_id: read some recorded outcomes, oldest first
SELECT {part_columns} FROM {schema}.part WHERE id = ANY ({bigint_array(:ids)}) ORDER BY id;

-- parts_of_run: read the recorded outcomes that may hold one run of a block, oldest first
-- The bytes of a position may also be the halves of two others, so some parts do not hold the run.
SELECT {part_columns} FROM {schema}.part
WHERE block_id = :block_id AND (positions IS NULL OR position(:block_offset::bytea IN positions) > 0) ORDER BY id;

-- sessions: list the sessions that have not ended
SELECT id, kind, host, pid, started_us, heartbeat_us, serves, environment, key_id FROM {schema}.session WHERE ended_us = 0 ORDER BY id;

-- lease_loads: count the leased runs of each session, with its last claim
SELECT session_id, sum(unsettled_count)::bigint, max(leased_us) FROM {schema}.span
WHERE {leased()} GROUP BY session_id;

-- waiting_lanes: list the lanes of an environment that have a waiting span
SELECT lane.queue, lane.task, coalesce(queue.paused, 0)
FROM {schema}.lane LEFT JOIN {schema}.queue ON queue.environment = lane.environment AND queue.name = lane.queue
CROSS JOIN LATERAL (SELECT 1 FROM {schema}.span
    WHERE span.state = 'waiting' AND span.environment = lane.environment AND span.queue = lane.queue
        AND span.task = lane.task LIMIT 1) AS waiting
WHERE lane.environment = :environment;

-- waiting_lanes_of_batch: list the lanes of some waiting spans of a batch
-- The state is written as a range, so that only the index of a batch's unsettled spans can serve the statement.
SELECT DISTINCT waiting.queue, waiting.task, coalesce(queue.paused, 0)
FROM (SELECT environment, queue, task FROM {schema}.span
    WHERE batch_id = :batch_id AND state >= 'waiting' AND state <> 'done' LIMIT :rows_max) AS waiting
LEFT JOIN {schema}.queue ON queue.environment = waiting.environment AND queue.name = waiting.queue;

-- duties: list when each duty of upkeep can be taken again
SELECT name, free_us FROM {schema}.duty;

-- clock: read the time of the database's machine, which all hosts follow
SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;

-- known_keys: read the runs that some idempotency keys name, unless the key has expired
SELECT idempotency.task, idempotency.key, idempotency.batch_id, idempotency.run_index
FROM jsonb_array_elements(:rows::jsonb) AS wanted (value)
CROSS JOIN LATERAL (
    SELECT task, key, batch_id, run_index, expires_us FROM {schema}.idempotency
    WHERE environment = :environment AND task = wanted.value->>0 AND key = wanted.value->>1 LIMIT 1
) AS idempotency
WHERE idempotency.expires_us = 0 OR idempotency.expires_us > :now_us;

-- list_queues: list queues with the numbers of their unsettled runs, which are counted once for all queues
WITH counts AS (
    SELECT queue,
        sum(CASE WHEN state = 'waiting' THEN unsettled_count END)::bigint AS waiting_count,
        sum(CASE WHEN state = 'delayed' THEN unsettled_count END)::bigint AS delayed_count,
        sum(CASE WHEN state = 'leased' THEN unsettled_count END)::bigint AS leased_count,
        min(CASE WHEN state = 'waiting' THEN greatest(since_us, due_us) END) AS oldest_us
    FROM {schema}.span WHERE state <> 'done' AND environment = :environment GROUP BY queue
)
SELECT queue.name, queue.paused, coalesce(waiting_count, 0), coalesce(delayed_count, 0), coalesce(leased_count, 0),
    coalesce(oldest_us, 0)
FROM {schema}.queue LEFT JOIN counts ON counts.queue = queue.name
WHERE queue.environment = :environment ORDER BY queue.name;

-- list_spans: list spans that may have runs of a listing, newest batch first
SELECT {span_columns(span.)}, block.first_index, block.gaps
FROM {schema}.batch JOIN {schema}.block ON block.batch_id = batch.id JOIN {schema}.span ON span.block_id = block.id
WHERE batch.environment = :environment AND (:batch_id::text = '' OR batch.id = :batch_id)
    AND (:task::text = '' OR span.task = :task) AND (:queue::text = '' OR span.queue = :queue)
    AND span.since_us >= :since_us AND (:state::bytea IS NULL OR position(:state::bytea IN span.states) > 0)
    AND (:span_state::text = '' OR span.state = :span_state)
    AND (:after_batch::text = '' OR batch.id < :after_batch OR batch.id = :after_batch AND block.last_index > :after_index)
ORDER BY batch.id DESC, block.first_index, span.id LIMIT :rows_max;

-- tasks_of_batches: read the tasks in the first and in the last block of some batches
SELECT DISTINCT batch.id, span.task
FROM {schema}.batch
CROSS JOIN LATERAL (
    (SELECT block.id FROM {schema}.block WHERE block.batch_id = batch.id ORDER BY first_index LIMIT 1)
    UNION ALL
    (SELECT block.id FROM {schema}.block WHERE block.batch_id = batch.id ORDER BY first_index DESC LIMIT 1)
) AS outer_block
JOIN {schema}.span ON span.block_id = outer_block.id
WHERE batch.id = ANY ({text_array(:ids)}) AND batch.environment = :environment
ORDER BY batch.id, span.task;

-- tagged_runs: list the runs with a tag
SELECT batch_id, run_index FROM {schema}.tag
WHERE environment = :environment AND tag = :tag AND (:batch_id::text = '' OR batch_id = :batch_id)
    AND (:after_batch::text = '' OR batch_id < :after_batch OR batch_id = :after_batch AND run_index > :after_index)
ORDER BY batch_id DESC, run_index LIMIT :rows_max;

-- named_objects: read which of some object keys a row names
SELECT key FROM {schema}.object WHERE key = ANY ({text_array(:keys)});

-- next_due: read when the next delayed span of some tasks is due
SELECT min(due_us) FROM {schema}.span WHERE state = 'delayed' AND environment = :environment
    AND task = ANY ({text_array(:tasks)});

-- blocks_of_batch: read which indexes the blocks of a batch hold, to count it
SELECT id, first_index, runs_count, gaps FROM {schema}.block WHERE batch_id = :batch_id AND id > :after_id ORDER BY id LIMIT :rows_max;

-- spans_of_blocks: read all spans over some blocks
SELECT {span_columns()}
FROM {schema}.span WHERE block_id = ANY ({bigint_array(:ids)}) ORDER BY id;
