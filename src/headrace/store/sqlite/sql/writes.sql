-- take_ids: reserve ids for new blocks and spans, and return the first of each
UPDATE headrace_sequence SET next_block_id = next_block_id + :blocks_count, next_span_id = next_span_id + :spans_count
WHERE only_row = 1
RETURNING next_block_id - :blocks_count, next_span_id - :spans_count;

-- insert_batch: create a batch
INSERT INTO headrace_batch ({batch_columns}, received)
VALUES (:id, :environment, :key, :kind, :task, :state, :expected_count, 0, 0, 0, 0, 0, '{}', x'', :metadata,
    :session_id, :created_us, 0, 0, 0, :seal_timeout_ms, 0, x'')
ON CONFLICT DO NOTHING RETURNING 1;

-- update_batch: update a batch after a decision; its identity never changes
UPDATE headrace_batch SET state = :state, expected_count = :expected_count, received_count = :received_count,
    completed_count = :completed_count, failed_count = :failed_count, cancelled_count = :cancelled_count,
    expired_count = :expired_count, order_bases = :order_bases, cursor = :cursor, appended_us = :appended_us,
    sealed_us = :sealed_us, finished_us = :finished_us
WHERE id = :id;

-- count_outcomes: count outcomes of a batch, unless they are its last ones
UPDATE headrace_batch SET {outcome_counts(:)}
WHERE id = :id AND NOT ({ends_batch(:completed + :failed + :cancelled + :expired)})
RETURNING id;

-- update_received: store the received indexes after an append, and the width of the widest block
UPDATE headrace_batch SET received = :received, block_width = max(block_width, :block_width) WHERE id = :id;

-- insert_blocks: insert blocks from rows and one blob with all their bytes
INSERT INTO headrace_block (id, batch_id, first_index, last_index, runs_count, gaps, extras, items)
SELECT json_extract(value, '$[0]'), :batch_id, json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]'),
    iif(json_extract(value, '$[5]') < 0, NULL, substr(:blob, json_extract(value, '$[4]'), json_extract(value, '$[5]'))),
    iif(json_extract(value, '$[7]') < 0, NULL, substr(:blob, json_extract(value, '$[6]'), json_extract(value, '$[7]'))),
    substr(:blob, json_extract(value, '$[8]'), json_extract(value, '$[9]'))
FROM json_each(:rows);

-- insert_spans: insert spans from rows and one blob
INSERT INTO headrace_span (id, block_id, batch_id, environment, queue, task, priority, due_us, expires_us, at_most_once,
    order_no, first_index, attempt, crashes_count, crashes_alone_count, unsettled_count, state, session_id, claim_no,
    token, dead_letter, note, since_us, leased_us, positions, states)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'),
    json_extract(value, '$[6]'), json_extract(value, '$[7]'), json_extract(value, '$[8]'),
    json_extract(value, '$[9]'), json_extract(value, '$[10]'), json_extract(value, '$[11]'),
    json_extract(value, '$[12]'), json_extract(value, '$[13]'), json_extract(value, '$[14]'),
    json_extract(value, '$[15]'), json_extract(value, '$[16]'), json_extract(value, '$[17]'),
    json_extract(value, '$[18]'), json_extract(value, '$[19]'), json_extract(value, '$[24]'),
    json_extract(value, '$[25]'), json_extract(value, '$[26]'), json_extract(value, '$[27]'),
    iif(json_extract(value, '$[21]') < 0, NULL,
        substr(:blob, json_extract(value, '$[20]'), json_extract(value, '$[21]'))),
    substr(:blob, json_extract(value, '$[22]'), json_extract(value, '$[23]'))
FROM json_each(:rows);

-- update_spans: update spans after a decision; only their state changes, never their runs
UPDATE headrace_span AS span SET order_no = fresh.order_no, crashes_count = fresh.crashes_count,
    crashes_alone_count = fresh.crashes_alone_count, unsettled_count = fresh.unsettled_count, state = fresh.state,
    session_id = fresh.session_id, claim_no = fresh.claim_no, token = fresh.token,
    leased_us = fresh.leased_us, states = substr(:blob, fresh.states_start, fresh.states_bytes)
FROM (
    SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS order_no,
        json_extract(value, '$[2]') AS crashes_count, json_extract(value, '$[3]') AS crashes_alone_count,
        json_extract(value, '$[4]') AS unsettled_count, json_extract(value, '$[5]') AS state,
        json_extract(value, '$[6]') AS session_id, json_extract(value, '$[7]') AS claim_no,
        json_extract(value, '$[8]') AS token, json_extract(value, '$[9]') AS states_start,
        json_extract(value, '$[10]') AS states_bytes, json_extract(value, '$[11]') AS leased_us
    FROM json_each(:rows)
) AS fresh
WHERE span.id = fresh.id;

-- update_states: update only the states of runs of some spans
UPDATE headrace_span AS span SET unsettled_count = fresh.unsettled_count, states = substr(:blob, fresh.states_start, fresh.states_bytes)
FROM (
    SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS unsettled_count,
        json_extract(value, '$[2]') AS states_start, json_extract(value, '$[3]') AS states_bytes
    FROM json_each(:rows)
) AS fresh
WHERE span.id = fresh.id;

-- insert_parts: insert recorded outcomes from rows and one blob
INSERT INTO headrace_part ({part_columns})
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]'), json_extract(value, '$[4]'),
    iif(json_extract(value, '$[6]') < 0, NULL, substr(:blob, json_extract(value, '$[5]'), json_extract(value, '$[6]'))),
    substr(:blob, json_extract(value, '$[7]'), json_extract(value, '$[8]')),
    substr(:blob, json_extract(value, '$[9]'), json_extract(value, '$[10]'))
FROM json_each(:rows);

-- know_lanes: create the lanes of an append
INSERT OR IGNORE INTO headrace_lane (environment, queue, task)
SELECT :environment, json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(:rows);

-- know_queue: create a queue, with its clock at 0
INSERT OR IGNORE INTO headrace_queue (environment, name, clock, paused) VALUES (:environment, :name, 0, 0);

-- pause_queue: pause or resume claims from a queue
UPDATE headrace_queue SET paused = :paused WHERE environment = :environment AND name = :name;

-- advance_clock: advance a queue's clock, unless another claim has advanced it as far
UPDATE headrace_queue SET clock = :order_no WHERE environment = :environment AND name = :name AND clock < :order_no;

-- insert_keys: insert idempotency keys of new runs, and replace expired keys
INSERT INTO headrace_idempotency AS idempotency (environment, task, key, batch_id, run_index, expires_us)
SELECT :environment, json_extract(value, '$[0]'), json_extract(value, '$[1]'), :batch_id, json_extract(value, '$[2]'),
    json_extract(value, '$[3]')
FROM json_each(:rows)
WHERE true
ON CONFLICT (environment, task, key) DO UPDATE
SET batch_id = excluded.batch_id, run_index = excluded.run_index, expires_us = excluded.expires_us
WHERE idempotency.expires_us > 0 AND idempotency.expires_us <= :now_us
RETURNING 1;

-- free_keys: delete idempotency keys whose runs failed, were cancelled or expired
DELETE FROM headrace_idempotency WHERE environment = :environment
    AND (task, key) IN (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(:rows));

-- insert_tags: insert tags of new runs
INSERT OR IGNORE INTO headrace_tag (environment, tag, batch_id, run_index)
SELECT :environment, json_extract(value, '$[0]'), :batch_id, json_extract(value, '$[1]') FROM json_each(:rows);

-- insert_objects: insert objects that rows of a batch name
INSERT OR IGNORE INTO headrace_object (key, batch_id)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(:rows);

-- lease_spans: lease whole spans
UPDATE headrace_span SET state = 'leased', session_id = :session_id, claim_no = :claim_no, token = token + 1,
    leased_us = :now_us
WHERE id IN (SELECT value FROM json_each(:ids));

-- insert_session: register a process, once
INSERT OR IGNORE INTO headrace_session (id, kind, host, pid, started_us, heartbeat_us, ended_us, serves, environment, key_id)
VALUES (:id, :kind, :host, :pid, :started_us, :heartbeat_us, 0, :serves, :environment, :key_id);

-- serves_of_session: read the lanes that a session claims from
SELECT serves FROM headrace_session WHERE id = :id;

-- put_serves: store the lanes that a session claims from
UPDATE headrace_session SET serves = :serves WHERE id = :id;

-- beat: renew a live session
UPDATE headrace_session SET heartbeat_us = max(heartbeat_us, :now_us) WHERE id = :id AND ended_us = 0
    AND environment = coalesce(:environment, environment) AND key_id = coalesce(:key_id, key_id)
RETURNING 0;

-- take_duty: take a duty that no process holds, until a time
INSERT INTO headrace_duty AS duty (name, holder, free_us) VALUES (:name, :holder, :free_us)
ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, free_us = excluded.free_us WHERE duty.free_us <= :now_us
RETURNING 1;

-- end_duty: end a duty, which can be taken again at a time
UPDATE headrace_duty SET free_us = :free_us WHERE name = :name AND holder = :holder;

-- end_session: end a session, once
UPDATE headrace_session SET ended_us = :now_us WHERE id = :id AND ended_us = 0
    AND environment = coalesce(:environment, environment) AND key_id = coalesce(:key_id, key_id)
RETURNING 1;

-- end_silent_session: end a session without a recent heartbeat, once
UPDATE headrace_session SET ended_us = :now_us WHERE id = :id AND ended_us = 0 AND heartbeat_us <= :silent_since_us
RETURNING 1;

-- ask_to_cancel: mark leased runs to be cancelled when their worker's heartbeat is answered
INSERT OR IGNORE INTO headrace_cancellation (batch_id, run_index)
SELECT :batch_id, value FROM json_each(:indexes);

-- forget_cancellations: remove the marks of runs that run again
DELETE FROM headrace_cancellation WHERE batch_id = :batch_id AND run_index IN (SELECT value FROM json_each(:indexes));

-- delete_parts: delete a bounded number of the parts of some blocks
DELETE FROM headrace_part WHERE id IN (SELECT id FROM headrace_part WHERE block_id IN (SELECT value FROM json_each(:ids)) LIMIT :rows_max)
RETURNING 1;

-- delete_spans: delete a bounded number of the spans of some blocks
DELETE FROM headrace_span WHERE id IN (SELECT id FROM headrace_span WHERE block_id IN (SELECT value FROM json_each(:ids)) LIMIT :rows_max)
RETURNING 1;

-- delete_blocks: delete some blocks, which have no spans and parts any more
DELETE FROM headrace_block WHERE id IN (SELECT value FROM json_each(:ids));

-- delete_keys: delete a bounded number of the idempotency keys of some batches
DELETE FROM headrace_idempotency WHERE (environment, task, key) IN (
    SELECT environment, task, key FROM headrace_idempotency WHERE batch_id IN (SELECT value FROM json_each(:ids)) LIMIT :rows_max)
RETURNING 1;

-- delete_tags: delete a bounded number of the tags of some batches
DELETE FROM headrace_tag WHERE (environment, tag, batch_id, run_index) IN (
    SELECT environment, tag, batch_id, run_index FROM headrace_tag WHERE batch_id IN (SELECT value FROM json_each(:ids)) LIMIT :rows_max)
RETURNING 1;

-- delete_objects: delete a bounded number of the objects of some batches, which become orphans
DELETE FROM headrace_object WHERE key IN (SELECT key FROM headrace_object WHERE batch_id IN (SELECT value FROM json_each(:ids)) LIMIT :rows_max)
RETURNING batch_id;

-- delete_cancellations: delete the cancellation marks of some batches
DELETE FROM headrace_cancellation WHERE batch_id IN (SELECT value FROM json_each(:ids));

-- delete_batches: delete some batches, as the last step
DELETE FROM headrace_batch WHERE id IN (SELECT value FROM json_each(:ids));

-- delete_sessions: delete sessions that ended long ago and own no unfinished stream
DELETE FROM headrace_session AS session WHERE ended_us > 0 AND ended_us < :before_us
AND NOT EXISTS (SELECT 1 FROM headrace_span AS span WHERE span.session_id = session.id AND span.state = 'leased')
AND NOT EXISTS (SELECT 1 FROM headrace_batch AS batch WHERE batch.session_id = session.id AND batch.session_id <> ''
    AND batch.finished_us = 0);
