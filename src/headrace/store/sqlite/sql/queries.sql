-- batch: one batch by id
SELECT {batch_columns}
FROM batch WHERE id = :id;

-- lock_batch: one batch that this transaction is about to change
SELECT {batch_columns}
FROM batch WHERE id = :id;

-- lock_batches: some batches that this transaction is about to change, in one order
SELECT {batch_columns}
FROM batch WHERE id IN (SELECT value FROM json_each(:ids));

-- batch_by_key: the batch that a key names
SELECT {batch_columns}
FROM batch WHERE environment = :environment AND key = :key;

-- lock_streams_of_session: unfinished streams that a session owns, about to be changed
SELECT {batch_columns}
FROM batch WHERE session_id = :session_id AND session_id <> '' AND state = 'open';

-- list_batches: batches of an environment, newest first
SELECT {batch_columns}
FROM batch
WHERE environment = :environment AND (:before_id = '' OR id < :before_id)
    AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
ORDER BY id DESC LIMIT :rows_max;

-- open_batches: batches that take items, for their seal deadline
SELECT {batch_columns}
FROM batch WHERE state = 'open' AND finished_us = 0 AND state IN ('open', 'cancelled', 'abandoned') AND seal_timeout_ms > 0
    AND max(created_us, appended_us) + seal_timeout_ms * 1000 <= :now_us LIMIT :rows_max;

-- stopping_batches: cancelled and abandoned batches that have not ended
SELECT id FROM batch WHERE state IN ('cancelled', 'abandoned') AND finished_us = 0
    AND state IN ('open', 'cancelled', 'abandoned');

-- finished_batches: batches that ended before a moment, and of which nobody has to look at anything
SELECT id, environment FROM batch WHERE finished_us > 0 AND finished_us <= :before_us
    AND NOT EXISTS (SELECT 1 FROM dead_letter WHERE dead_letter.batch_id = batch.id)
ORDER BY finished_us LIMIT :rows_max;

-- received: the set of indexes a batch has received
SELECT received FROM batch WHERE id = :id;

-- leased_count: how many runs of a batch are leased
SELECT coalesce(sum(unsettled_count), 0) FROM span
WHERE batch_id = :batch_id AND state = 'leased' AND state <> 'done';

-- blocks_from: the blocks that may hold an index or those after it, by first index
SELECT id, first_index, last_index, runs_count, gaps FROM block
WHERE batch_id = :batch_id AND first_index > :after_index AND first_index < :before_index
    AND last_index >= :from_index
ORDER BY first_index, id LIMIT :rows_max;

-- shapes_of_blocks: which indexes some blocks hold
SELECT id, first_index, runs_count, gaps FROM block WHERE id IN (SELECT value FROM json_each(:ids));

-- extras_of_blocks: what only some runs of some blocks have
SELECT id, extras FROM block WHERE extras IS NOT NULL AND id IN (SELECT value FROM json_each(:ids));

-- states_of_blocks: how the runs of some blocks stand
SELECT block_id, positions, states FROM span WHERE block_id IN (SELECT value FROM json_each(:ids)) ORDER BY id;

-- parts_of_blocks: the recorded outcomes of some blocks, oldest first
SELECT {part_columns} FROM part
WHERE block_id IN (SELECT value FROM json_each(:ids)) ORDER BY id;

-- sessions: the sessions that have not ended
SELECT id, kind, host, pid, started_us, heartbeat_us, ended_us FROM session WHERE ended_us = 0 ORDER BY id;

-- duties: when each duty of upkeep is free to be taken
SELECT name, free_us FROM duty;

-- known_keys: the runs that some idempotency keys name and that have not expired
SELECT idempotency.task, idempotency.key, idempotency.batch_id, idempotency.run_index
FROM json_each(:rows) AS wanted
CROSS JOIN idempotency ON idempotency.environment = :environment
    AND idempotency.task = json_extract(wanted.value, '$[0]') AND idempotency.key = json_extract(wanted.value, '$[1]')
WHERE idempotency.expires_us = 0 OR idempotency.expires_us > :now_us;

-- list_queues: queues with what stands in them, from unsettled spans only
SELECT queue.name, queue.paused,
    coalesce(sum(CASE WHEN span.state = 'waiting' THEN span.unsettled_count END), 0),
    coalesce(sum(CASE WHEN span.state = 'delayed' THEN span.unsettled_count END), 0),
    coalesce(sum(CASE WHEN span.state = 'leased' THEN span.unsettled_count END), 0),
    coalesce(min(CASE WHEN span.state = 'waiting' THEN max(span.since_us, span.due_us) END), 0)
FROM queue
LEFT JOIN span ON span.state <> 'done' AND span.environment = queue.environment AND span.queue = queue.name
WHERE queue.environment = :environment
GROUP BY queue.name ORDER BY queue.name;

-- list_spans: spans that may hold runs a person asks for, newest batch first
SELECT {span_columns(span.)}, block.first_index, block.gaps
FROM batch CROSS JOIN block ON block.batch_id = batch.id CROSS JOIN span ON span.block_id = block.id
WHERE batch.environment = :environment AND (:batch_id = '' OR batch.id = :batch_id)
    AND (:task = '' OR span.task = :task) AND (:state IS NULL OR instr(span.states, :state) > 0)
    AND (:span_state = '' OR span.state = :span_state)
    AND (:after_batch = '' OR batch.id < :after_batch OR batch.id = :after_batch AND block.last_index > :after_index)
ORDER BY batch.id DESC, block.first_index, span.id LIMIT :rows_max;

-- tagged_runs: the runs that carry a tag
SELECT batch_id, run_index FROM tag
WHERE environment = :environment AND tag = :tag AND (:batch_id = '' OR batch_id = :batch_id)
    AND (:after_batch = '' OR batch_id < :after_batch OR batch_id = :after_batch AND run_index > :after_index)
ORDER BY batch_id DESC, run_index LIMIT :rows_max;

-- named_objects: which of some object keys a row names
SELECT key FROM object WHERE key IN (SELECT value FROM json_each(:keys));

-- next_due: when the next delayed span of some tasks becomes claimable
SELECT min(due_us) FROM span WHERE state = 'delayed' AND environment = :environment
    AND task IN (SELECT value FROM json_each(:tasks));

-- blocks_of_batch: the shape of a batch's blocks, for counting it anew
SELECT id, first_index, runs_count, gaps FROM block WHERE batch_id = :batch_id AND id > :after_id ORDER BY id LIMIT :rows_max;

-- spans_of_blocks: all spans over some blocks
SELECT {span_columns()}
FROM span WHERE block_id IN (SELECT value FROM json_each(:ids)) ORDER BY id;
