-- moved_until: read the progress of a copy, and lock it
SELECT block_id FROM {schema}.move WHERE id = :id FOR UPDATE;

-- move_until: store the progress of a copy, in the transaction of its page
INSERT INTO {schema}.move (id, block_id) VALUES (:id, :block_id)
ON CONFLICT (id) DO UPDATE SET block_id = excluded.block_id;

-- forget_move: delete a copy that was undone
DELETE FROM {schema}.move WHERE id = :id;

-- taken_keys: read keys of batches that name other batches here
SELECT batch.environment, batch.key FROM jsonb_array_elements(:rows::jsonb) AS given (value)
CROSS JOIN LATERAL (
    SELECT id, environment, key FROM {schema}.batch WHERE environment = value->>0 AND key = value->>1 LIMIT 1
) AS batch
WHERE batch.id NOT IN (SELECT value->>2 FROM jsonb_array_elements(:rows::jsonb) AS given (value));

-- insert_moved_batch: insert a copied batch as it was in its source
INSERT INTO {schema}.batch ({batch_columns}, received)
VALUES (:id, :environment, :key, :kind, :task, :state, :expected_count, :received_count, :completed_count,
    :failed_count, :cancelled_count, :expired_count, :order_bases, :cursor, :metadata, '', :created_us, :appended_us,
    :sealed_us, :finished_us, :seal_timeout_ms, :block_width, :received)
ON CONFLICT DO NOTHING RETURNING 1;

-- free_moved_spans: make the spans of a copied batch claimable, at the current clock of their queue
UPDATE {schema}.span SET state = CASE WHEN due_us > :now_us THEN 'delayed' ELSE 'waiting' END,
    order_no = greatest(order_no + :offset, queue.clock)
FROM {schema}.queue
WHERE span.batch_id = :batch_id AND span.state = 'moving' AND queue.environment = span.environment AND queue.name = span.queue;

-- insert_moved_dead: insert dead letters of a copied batch
INSERT INTO {schema}.dead_letter (batch_id, run_index, environment, queue, task, died_us)
SELECT value->>0, (value->>1)::bigint, value->>2, value->>3, value->>4, (value->>5)::bigint
FROM jsonb_array_elements(:rows::jsonb) AS given (value)
ON CONFLICT DO NOTHING;

-- delete_dead: delete a bounded number of a batch's dead letters
DELETE FROM {schema}.dead_letter WHERE (batch_id, run_index) IN (
    SELECT batch_id, run_index FROM {schema}.dead_letter WHERE batch_id = :batch_id LIMIT :rows_max)
RETURNING 1;
