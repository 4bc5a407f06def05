-- insert_dead: add runs that failed finally to the dead letters; a run that fails again gets a new time
INSERT INTO {schema}.dead_letter (batch_id, run_index, environment, queue, task, died_us)
SELECT value->>0, (value->>1)::bigint, value->>2, value->>3, value->>4, :now_us::bigint
FROM jsonb_array_elements(:rows::jsonb) AS given (value)
ON CONFLICT (batch_id, run_index) DO UPDATE SET died_us = excluded.died_us;

-- list_dead: list dead letters, oldest first
SELECT batch_id, run_index, queue, task, died_us FROM {schema}.dead_letter
WHERE environment = :environment AND (:queue::text = '' OR queue = :queue)
    AND (:before_us::bigint = 0 OR died_us < :before_us::bigint)
    AND (died_us, batch_id, run_index) > (:after_us::bigint, :after_batch, :after_index::bigint)
ORDER BY died_us, batch_id, run_index LIMIT :rows_max;

-- forget_dead: remove runs of a batch from the dead letters, before they run again
DELETE FROM {schema}.dead_letter WHERE batch_id = :batch_id
    AND run_index = ANY ({bigint_array(:indexes)});

-- purge_dead: remove dead letters that an operator has dealt with
DELETE FROM {schema}.dead_letter
WHERE concat(environment) = :environment -- prevents the use of an index that holds all dead letters of the environment
    AND batch_id = ANY (ARRAY(SELECT value->>0 FROM jsonb_array_elements(:rows::jsonb) AS given (value)))
    AND (batch_id, run_index) IN (SELECT value->>0, (value->>1)::bigint FROM jsonb_array_elements(:rows::jsonb) AS given (value))
RETURNING 1;

-- rules: read the rules of an environment
SELECT name, value FROM {schema}.rule WHERE environment = :environment ORDER BY name;

-- keep_rules: store a rule, unless it changed since it was read
INSERT INTO {schema}.rule (environment, name, value) VALUES (:environment, :name, :value)
ON CONFLICT (environment, name) DO UPDATE SET value = excluded.value
WHERE rule.value = excluded.value OR rule.value = :before::bytea
RETURNING name;

-- lock_waiting: lock waiting spans of one lane, in claim order, before they are moved
SELECT id FROM {schema}.span WHERE state = 'waiting' AND environment = :environment AND queue = :queue AND task = :task
ORDER BY {claim_order()} LIMIT :rows_max FOR UPDATE SKIP LOCKED;

-- move_spans: move waiting spans, locked in this transaction, to another queue
UPDATE {schema}.span SET queue = :queue WHERE id = ANY ({bigint_array(:ids)});

-- size_bytes: read the size of the database
SELECT pg_database_size(current_database());
