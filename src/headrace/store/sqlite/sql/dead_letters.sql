-- insert_dead: add runs that failed finally to the dead letters; a run that fails again gets a new time
INSERT INTO headrace_dead_letter (batch_id, run_index, environment, queue, task, died_us)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]'), json_extract(value, '$[4]'), :now_us
FROM json_each(:rows)
WHERE true
ON CONFLICT (batch_id, run_index) DO UPDATE SET died_us = excluded.died_us;

-- list_dead: list dead letters, oldest first
SELECT batch_id, run_index, queue, task, died_us FROM headrace_dead_letter
WHERE environment = :environment AND (:queue = '' OR queue = :queue) AND (:before_us = 0 OR died_us < :before_us)
    AND (died_us, batch_id, run_index) > (:after_us, :after_batch, :after_index)
ORDER BY died_us, batch_id, run_index LIMIT :rows_max;

-- forget_dead: remove runs of a batch from the dead letters, before they run again
DELETE FROM headrace_dead_letter WHERE batch_id = :batch_id AND run_index IN (SELECT value FROM json_each(:indexes));

-- purge_dead: remove dead letters that an operator has dealt with
-- The plus sign prevents the use of an index that holds all dead letters of the environment.
DELETE FROM headrace_dead_letter WHERE +environment = :environment
    AND (batch_id, run_index) IN (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(:rows))
RETURNING 1;

-- rules: read the rules of an environment
SELECT name, value FROM headrace_rule WHERE environment = :environment ORDER BY name;

-- keep_rules: store a rule, unless it changed since it was read
INSERT INTO headrace_rule AS rule (environment, name, value) VALUES (:environment, :name, :value)
ON CONFLICT (environment, name) DO UPDATE SET value = excluded.value
WHERE rule.value = excluded.value OR rule.value = :before
RETURNING name;

-- lock_waiting: lock waiting spans of one lane, in claim order, before they are moved
SELECT id FROM headrace_span WHERE state = 'waiting' AND environment = :environment AND queue = :queue AND task = :task
ORDER BY {claim_order()} LIMIT :rows_max;

-- move_spans: move waiting spans, locked in this transaction, to another queue
UPDATE headrace_span SET queue = :queue WHERE id IN (SELECT value FROM json_each(:ids));

-- size_bytes: read the size of the database
SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size();
