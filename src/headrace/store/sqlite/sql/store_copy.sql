-- move_state: read whether this file was fenced for a copy, and whether the copy is complete
SELECT id, target, finished_us FROM headrace_move;

-- begin_move: store the copy that fences this file
INSERT INTO headrace_move (only_row, id, target, started_us, finished_us) VALUES (1, :id, :target, :now_us, 0);

-- finish_move: mark the copy as complete; this file is not used any more
UPDATE headrace_move SET finished_us = :now_us WHERE only_row = 1;

-- forget_move: delete a copy that was undone
DELETE FROM headrace_move WHERE finished_us = 0;

-- moving_total: count the runs to copy
SELECT coalesce(sum(received_count), 0) FROM headrace_batch;

-- moving_blocks: read the next blocks, in id order
SELECT id, batch_id, first_index, last_index, runs_count, gaps, extras, items FROM headrace_block
WHERE id > :after_id ORDER BY id LIMIT :rows_max;

-- moving_batches: read the next batches with all columns
SELECT {batch_columns}, received
FROM headrace_batch WHERE id > :after_id ORDER BY id LIMIT :rows_max;

-- moving_keys: read the next idempotency keys of a batch
SELECT task, key, run_index, expires_us FROM headrace_idempotency
WHERE batch_id = :batch_id AND (task, key) > (:task, :key) ORDER BY task, key LIMIT :rows_max;

-- moving_tags: read the next tags of a batch
SELECT tag, run_index FROM headrace_tag
WHERE batch_id = :batch_id AND (tag, run_index) > (:tag, :run_index) ORDER BY tag, run_index LIMIT :rows_max;

-- moving_objects: read the next objects of a batch
SELECT key, batch_id FROM headrace_object WHERE batch_id = :batch_id AND key > :key ORDER BY key LIMIT :rows_max;

-- moving_cancellations: read the runs of a batch that are to be cancelled
SELECT run_index FROM headrace_cancellation WHERE batch_id = :batch_id ORDER BY run_index;

-- moving_dead: read the next dead letters of a batch
SELECT run_index, queue, task, died_us FROM headrace_dead_letter
WHERE batch_id = :batch_id AND run_index > :run_index ORDER BY run_index LIMIT :rows_max;

-- moving_rules: read the rules of all environments
SELECT environment, name, value FROM headrace_rule ORDER BY environment, name;

-- moving_queues: read every queue with its clock
SELECT environment, name, clock, paused FROM headrace_queue ORDER BY environment, name;

-- moving_lanes: read every lane of an environment
SELECT queue, task FROM headrace_lane WHERE environment = :environment ORDER BY queue, task;
