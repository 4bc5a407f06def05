-- insert_batch: create a batch
INSERT INTO {schema}.batch ({batch_columns}, received)
VALUES (:id, :environment, :key, :kind, :task, :state, :expected_count, 0, 0, 0, 0, 0, '{}', ''::bytea, :metadata,
    :session_id, :created_us, 0, 0, 0, :seal_timeout_ms, 0, ''::bytea)
ON CONFLICT DO NOTHING RETURNING 1;

-- update_batch: update a batch after a decision; its identity never changes
UPDATE {schema}.batch SET state = :state, expected_count = :expected_count, received_count = :received_count,
    completed_count = :completed_count, failed_count = :failed_count, cancelled_count = :cancelled_count,
    expired_count = :expired_count, order_bases = :order_bases, cursor = :cursor, appended_us = :appended_us,
    sealed_us = :sealed_us, finished_us = :finished_us
WHERE id = :id;

-- count_outcomes: count outcomes of a batch, unless they are its last ones
UPDATE {schema}.batch SET {outcome_counts(:)}
WHERE id = :id AND NOT ({ends_batch(:completed::bigint + :failed::bigint + :cancelled::bigint + :expired::bigint)})
RETURNING id;

-- update_received: store the received indexes after an append, and the width of the widest block
UPDATE {schema}.batch SET received = :received, block_width = greatest(block_width, :block_width) WHERE id = :id;

-- insert_blocks: insert blocks from rows and one blob with all their bytes
INSERT INTO {schema}.block (id, batch_id, first_index, last_index, runs_count, gaps, extras, items)
SELECT (value->>0)::bigint, :batch_id, (value->>1)::bigint, (value->>2)::bigint, (value->>3)::bigint,
    CASE WHEN (value->>5)::int >= 0 THEN substring(:blob::bytea FROM (value->>4)::int FOR (value->>5)::int) END,
    CASE WHEN (value->>7)::int >= 0 THEN substring(:blob::bytea FROM (value->>6)::int FOR (value->>7)::int) END,
    substring(:blob::bytea FROM (value->>8)::int FOR (value->>9)::int)
FROM jsonb_array_elements(:rows::jsonb) AS given (value);

-- insert_spans: insert spans from rows and one blob
INSERT INTO {schema}.span (id, block_id, batch_id, environment, queue, task, priority, due_us, expires_us, at_most_once,
    order_no, first_index, attempt, crashes_count, crashes_alone_count, unsettled_count, state, session_id, claim_no,
    token, dead_letter, note, since_us, leased_us, positions, states)
SELECT (value->>0)::bigint, (value->>1)::bigint, value->>2, value->>3, value->>4, value->>5,
    (value->>6)::bigint, (value->>7)::bigint, (value->>8)::bigint, (value->>9)::bigint, (value->>10)::bigint, (value->>11)::bigint,
    (value->>12)::bigint, (value->>13)::bigint, (value->>14)::bigint, (value->>15)::bigint, value->>16, value->>17,
    (value->>18)::bigint, (value->>19)::bigint, (value->>24)::bigint, value->>25, (value->>26)::bigint,
    (value->>27)::bigint,
    CASE WHEN (value->>21)::int >= 0 THEN substring(:blob::bytea FROM (value->>20)::int FOR (value->>21)::int) END,
    substring(:blob::bytea FROM (value->>22)::int FOR (value->>23)::int)
FROM jsonb_array_elements(:rows::jsonb) AS given (value);

-- update_spans: update spans after a decision; only their state changes, never their runs
UPDATE {schema}.span SET order_no = (value->>1)::bigint, crashes_count = (value->>2)::bigint,
    crashes_alone_count = (value->>3)::bigint, unsettled_count = (value->>4)::bigint, state = value->>5,
    session_id = value->>6, claim_no = (value->>7)::bigint, token = (value->>8)::bigint,
    leased_us = (value->>11)::bigint, states = substring(:blob::bytea FROM (value->>9)::int FOR (value->>10)::int)
FROM jsonb_array_elements(:rows::jsonb) AS given (value)
WHERE span.id = (value->>0)::bigint
    AND span.id = ANY (ARRAY(SELECT (value->>0)::bigint FROM jsonb_array_elements(:rows::jsonb) AS given (value)));

-- update_states: update only the states of runs of some spans
UPDATE {schema}.span SET unsettled_count = (value->>1)::bigint,
    states = substring(:blob::bytea FROM (value->>2)::int FOR (value->>3)::int)
FROM jsonb_array_elements(:rows::jsonb) AS given (value)
WHERE span.id = (value->>0)::bigint
    AND span.id = ANY (ARRAY(SELECT (value->>0)::bigint FROM jsonb_array_elements(:rows::jsonb) AS given (value)));

-- insert_parts: insert recorded outcomes from rows and one blob
INSERT INTO {schema}.part ({part_columns})
SELECT (value->>0)::bigint, (value->>1)::bigint, (value->>2)::bigint, (value->>3)::bigint, (value->>4)::bigint,
    CASE WHEN (value->>6)::int >= 0 THEN substring(:blob::bytea FROM (value->>5)::int FOR (value->>6)::int) END,
    substring(:blob::bytea FROM (value->>7)::int FOR (value->>8)::int),
    substring(:blob::bytea FROM (value->>9)::int FOR (value->>10)::int)
FROM jsonb_array_elements(:rows::jsonb) AS given (value);

-- know_lanes: create the lanes of an append
INSERT INTO {schema}.lane (environment, queue, task)
SELECT :environment, value->>0, value->>1 FROM jsonb_array_elements(:rows::jsonb) AS given (value)
ON CONFLICT DO NOTHING;

-- know_queue: create a queue, with its clock at 0
INSERT INTO {schema}.queue (environment, name, clock, paused) VALUES (:environment, :name, 0, 0)
ON CONFLICT DO NOTHING;

-- pause_queue: pause or resume claims from a queue
UPDATE {schema}.queue SET paused = :paused WHERE environment = :environment AND name = :name;

-- advance_clock: advance a queue's clock, unless another claim has advanced it as far
UPDATE {schema}.queue SET clock = :order_no WHERE environment = :environment AND name = :name AND clock < :order_no;

-- insert_keys: insert idempotency keys of new runs, and replace expired keys
INSERT INTO {schema}.idempotency (environment, task, key, batch_id, run_index, expires_us)
SELECT :environment, value->>0, value->>1, :batch_id, (value->>2)::bigint, (value->>3)::bigint
FROM jsonb_array_elements(:rows::jsonb) AS given (value) ORDER BY value->>0, value->>1
ON CONFLICT (environment, task, key) DO UPDATE
SET batch_id = excluded.batch_id, run_index = excluded.run_index, expires_us = excluded.expires_us
WHERE idempotency.expires_us > 0 AND idempotency.expires_us <= :now_us
RETURNING 1;

-- free_keys: delete idempotency keys whose runs failed, were cancelled or expired
DELETE FROM {schema}.idempotency USING jsonb_array_elements(:rows::jsonb) AS given (value)
WHERE environment = :environment AND task = value->>0 AND key = value->>1
    AND task = ANY (ARRAY(SELECT value->>0 FROM jsonb_array_elements(:rows::jsonb) AS given (value)))
    AND key = ANY (ARRAY(SELECT value->>1 FROM jsonb_array_elements(:rows::jsonb) AS given (value)));

-- insert_tags: insert tags of new runs
INSERT INTO {schema}.tag (environment, tag, batch_id, run_index)
SELECT :environment, value->>0, :batch_id, (value->>1)::bigint FROM jsonb_array_elements(:rows::jsonb) AS given (value)
ORDER BY 2, 4
ON CONFLICT DO NOTHING;

-- insert_objects: insert objects that rows of a batch name
INSERT INTO {schema}.object (key, batch_id)
SELECT value->>0, value->>1 FROM jsonb_array_elements(:rows::jsonb) AS given (value) ORDER BY 1
ON CONFLICT DO NOTHING;

-- lease_spans: lease whole spans
UPDATE {schema}.span SET state = 'leased', session_id = :session_id, claim_no = :claim_no, token = token + 1,
    leased_us = :now_us
WHERE id = ANY ({bigint_array(:ids)});

-- insert_session: register a process, once
INSERT INTO {schema}.session (id, kind, host, pid, started_us, heartbeat_us, ended_us, serves, environment, key_id)
VALUES (:id, :kind, :host, :pid, :started_us, :heartbeat_us, 0, :serves, :environment, :key_id)
ON CONFLICT DO NOTHING;

-- serves_of_session: read the lanes that a session claims from
SELECT serves FROM {schema}.session WHERE id = :id;

-- put_serves: store the lanes that a session claims from
UPDATE {schema}.session SET serves = :serves WHERE id = :id;

-- beat: renew a live session, and return the time of the database's machine, which all hosts follow
UPDATE {schema}.session SET heartbeat_us = greatest(heartbeat_us, :now_us) WHERE id = :id AND ended_us = 0
    AND environment = coalesce(:environment, environment) AND key_id = coalesce(:key_id, key_id)
RETURNING (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;

-- take_duty: take a duty that no process holds, until a time
INSERT INTO {schema}.duty (name, holder, free_us) VALUES (:name, :holder, :free_us)
ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, free_us = excluded.free_us WHERE duty.free_us <= :now_us
RETURNING 1;

-- end_duty: end a duty, which can be taken again at a time
UPDATE {schema}.duty SET free_us = :free_us WHERE name = :name AND holder = :holder;

-- end_session: end a session, once, after the claims that found it alive (R3, a lapsed session is ended before it is recovered)
WITH live AS MATERIALIZED (
    SELECT id FROM {schema}.session WHERE id = :id AND ended_us = 0
        AND environment = coalesce(:environment, environment) AND key_id = coalesce(:key_id, key_id)
    FOR UPDATE
)
UPDATE {schema}.session SET ended_us = :now_us FROM live WHERE session.id = live.id
RETURNING 1;

-- end_silent_session: end a session without a recent heartbeat, once, after the claims that found it alive
WITH silent AS MATERIALIZED (
    SELECT id FROM {schema}.session WHERE id = :id AND ended_us = 0 AND heartbeat_us <= :silent_since_us FOR UPDATE
)
UPDATE {schema}.session SET ended_us = :now_us FROM silent WHERE session.id = silent.id
RETURNING 1;

-- ask_to_cancel: mark leased runs to be cancelled when their worker's heartbeat is answered
INSERT INTO {schema}.cancellation (batch_id, run_index)
SELECT :batch_id, value::bigint FROM jsonb_array_elements_text(:indexes::jsonb) AS given (value)
ON CONFLICT DO NOTHING;

-- forget_cancellations: remove the marks of runs that run again
DELETE FROM {schema}.cancellation WHERE batch_id = :batch_id AND run_index = ANY ({bigint_array(:indexes)});

-- delete_parts: delete a bounded number of the parts of some blocks
DELETE FROM {schema}.part WHERE id = ANY (ARRAY(SELECT id FROM {schema}.part WHERE block_id = ANY ({bigint_array(:ids)}) LIMIT :rows_max))
RETURNING 1;

-- delete_spans: delete a bounded number of the spans of some blocks
DELETE FROM {schema}.span WHERE id = ANY (ARRAY(SELECT id FROM {schema}.span WHERE block_id = ANY ({bigint_array(:ids)}) LIMIT :rows_max))
RETURNING 1;

-- delete_blocks: delete some blocks, which have no spans and parts any more
DELETE FROM {schema}.block WHERE id = ANY ({bigint_array(:ids)});

-- delete_keys: delete a bounded number of the idempotency keys of some batches
DELETE FROM {schema}.idempotency WHERE (environment, task, key) IN (
    SELECT environment, task, key FROM {schema}.idempotency WHERE batch_id = ANY ({text_array(:ids)}) LIMIT :rows_max)
RETURNING 1;

-- delete_tags: delete a bounded number of the tags of some batches
DELETE FROM {schema}.tag WHERE (environment, tag, batch_id, run_index) IN (
    SELECT environment, tag, batch_id, run_index FROM {schema}.tag WHERE batch_id = ANY ({text_array(:ids)}) LIMIT :rows_max)
RETURNING 1;

-- delete_objects: delete a bounded number of the objects of some batches, which become orphans
DELETE FROM {schema}.object WHERE key IN (SELECT key FROM {schema}.object WHERE batch_id = ANY ({text_array(:ids)}) LIMIT :rows_max)
RETURNING batch_id;

-- delete_cancellations: delete the cancellation marks of some batches
DELETE FROM {schema}.cancellation WHERE batch_id = ANY ({text_array(:ids)});

-- delete_batches: delete some batches, as the last step
DELETE FROM {schema}.batch WHERE id = ANY ({text_array(:ids)});

-- delete_sessions: delete sessions that ended long ago and own no unfinished stream
DELETE FROM {schema}.session WHERE ended_us > 0 AND ended_us < :before_us
AND NOT EXISTS (SELECT 1 FROM {schema}.span WHERE {leased(span.)} AND span.session_id = session.id LIMIT 1)
AND (SELECT count(*) FROM {schema}.batch WHERE batch.session_id = session.id AND batch.session_id <> ''
    AND batch.finished_us = 0) = 0;
