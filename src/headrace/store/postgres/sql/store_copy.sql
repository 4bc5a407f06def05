-- moved_until: how far a move has come
SELECT block_id FROM {schema}.move WHERE id = :id FOR UPDATE;

-- move_until: what was copied in this transaction is copied once
INSERT INTO {schema}.move (id, block_id) VALUES (:id, :block_id)
ON CONFLICT (id) DO UPDATE SET block_id = excluded.block_id;

-- forget_move: everything is here
DELETE FROM {schema}.move WHERE id = :id;

-- taken_keys: keys of batches that name other batches here
SELECT batch.environment, batch.key FROM jsonb_array_elements(:rows::jsonb) AS given (value)
CROSS JOIN LATERAL (
    SELECT id, environment, key FROM {schema}.batch WHERE environment = value->>0 AND key = value->>1 LIMIT 1
) AS batch
WHERE batch.id NOT IN (SELECT value->>2 FROM jsonb_array_elements(:rows::jsonb) AS given (value));

-- insert_moved_batch: a batch as it stood where it came from
INSERT INTO {schema}.batch ({batch_columns}, received)
VALUES (:id, :environment, :key, :kind, :task, :state, :expected_count, :received_count, :completed_count,
    :failed_count, :cancelled_count, :expired_count, :order_bases, :cursor, :metadata, '', :created_us, :appended_us,
    :sealed_us, :finished_us, :seal_timeout_ms, :block_width, :received)
ON CONFLICT DO NOTHING RETURNING 1;

-- free_moved_spans: spans that came with a batch stand as they stood, in the line of their queue as it is here
UPDATE {schema}.span SET state = CASE WHEN due_us > :now_us THEN 'delayed' ELSE 'waiting' END,
    order_no = greatest(order_no + :offset, queue.clock)
FROM {schema}.queue
WHERE span.batch_id = :batch_id AND span.state = 'moving' AND queue.environment = span.environment AND queue.name = span.queue;

-- insert_moved_dead: dead letters of a batch that died elsewhere
INSERT INTO {schema}.dead_letter (batch_id, run_index, environment, queue, task, died_us)
SELECT value->>0, (value->>1)::bigint, value->>2, value->>3, value->>4, (value->>5)::bigint
FROM jsonb_array_elements(:rows::jsonb) AS given (value)
ON CONFLICT DO NOTHING;

-- delete_dead: a bounded step of taking a move back
DELETE FROM {schema}.dead_letter WHERE (batch_id, run_index) IN (
    SELECT batch_id, run_index FROM {schema}.dead_letter WHERE batch_id = :batch_id LIMIT :rows_max)
RETURNING 1;
