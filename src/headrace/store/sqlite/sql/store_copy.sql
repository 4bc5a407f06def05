-- move_state: whether this file was fenced for a move, and whether that is over
SELECT id, target, finished_us FROM move;

-- begin_move: remember the move that fences this file
INSERT INTO move (only_row, id, target, started_us, finished_us) VALUES (1, :id, :target, :now_us, 0);

-- finish_move: the move is over, and this file only a copy
UPDATE move SET finished_us = :now_us WHERE only_row = 1;

-- forget_move: the move was given up before it was over
DELETE FROM move WHERE finished_us = 0;

-- moving_total: how many runs there are to move
SELECT coalesce(sum(received_count), 0) FROM batch;

-- moving_blocks: the next blocks, in the order they were made
SELECT id, batch_id, first_index, last_index, runs_count, gaps, extras, items FROM block
WHERE id > :after_id ORDER BY id LIMIT :rows_max;

-- moving_batches: the next batches with all that belongs to their row
SELECT {batch_columns}, received
FROM batch WHERE id > :after_id ORDER BY id LIMIT :rows_max;

-- moving_keys: the next idempotency keys of a batch
SELECT task, key, run_index, expires_us FROM idempotency
WHERE batch_id = :batch_id AND (task, key) > (:task, :key) ORDER BY task, key LIMIT :rows_max;

-- moving_tags: the next tags of a batch
SELECT tag, run_index FROM tag
WHERE batch_id = :batch_id AND (tag, run_index) > (:tag, :run_index) ORDER BY tag, run_index LIMIT :rows_max;

-- moving_objects: the next objects of a batch
SELECT key, batch_id FROM object WHERE batch_id = :batch_id AND key > :key ORDER BY key LIMIT :rows_max;

-- moving_cancellations: the runs of a batch that somebody asked to cancel
SELECT run_index FROM cancellation WHERE batch_id = :batch_id ORDER BY run_index;

-- moving_dead: the next dead letters of a batch
SELECT run_index, queue, task, died_us FROM dead_letter
WHERE batch_id = :batch_id AND run_index > :run_index ORDER BY run_index LIMIT :rows_max;

-- moving_rules: what people decided, everywhere
SELECT environment, name, value FROM rule ORDER BY environment, name;

-- moving_queues: every queue with its clock
SELECT environment, name, clock, paused FROM queue ORDER BY environment, name;

-- moving_lanes: every lane of an environment
SELECT queue, task FROM lane WHERE environment = :environment ORDER BY queue, task;
