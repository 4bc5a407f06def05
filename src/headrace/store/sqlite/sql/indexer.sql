-- indexer: read the state of an indexer
SELECT {indexer_columns}
FROM headrace_indexer WHERE environment = :environment AND name = :name;

-- indexers: list the indexers of an environment, by name
SELECT {indexer_columns}
FROM headrace_indexer WHERE environment = :environment ORDER BY name;

-- insert_indexer: create an indexer, before its first event
INSERT OR IGNORE INTO headrace_indexer ({indexer_columns})
VALUES (:environment, :name, 0, '{}', 0, 0, '', 0, '{}', 0, 0);

-- take_indexer: lease an indexer that has not changed since it was read, and return the new token
UPDATE headrace_indexer SET token = token + 1, beats = beats + 1, holder = :holder
WHERE environment = :environment AND name = :name AND token = :token AND beats = :beats
RETURNING token;

-- beat_indexer: renew the lease of the current holder
UPDATE headrace_indexer SET beats = beats + 1 WHERE environment = :environment AND name = :name AND token = :token
RETURNING 1;

-- leave_indexer: release the lease of the current holder
UPDATE headrace_indexer SET holder = '', beats = beats + 1
WHERE environment = :environment AND name = :name AND token = :token;

-- move_checkpoint: advance or roll back the checkpoint under the lease, as the guard of every commit
UPDATE headrace_indexer SET no = :no, positions = :positions, is_caught_up = :is_caught_up, moved_us = :now_us,
    beats = beats + 1
WHERE environment = :environment AND name = :name AND no = :old_no AND token = :token
RETURNING 1;

-- move_floor: store the oldest checkpoint that a rollback can reach
UPDATE headrace_indexer SET floor_no = :floor_no, floor_positions = :floor_positions
WHERE environment = :environment AND name = :name;

-- delete_indexer: delete the state of an indexer
DELETE FROM headrace_indexer WHERE environment = :environment AND name = :name;

-- indexer_tables: list the tables that indexers created
SELECT name, environment, indexer, columns, has_history FROM headrace_indexer_table ORDER BY name;

-- put_indexer_table: store for which entity a table was created
INSERT INTO headrace_indexer_table (name, environment, indexer, columns, has_history)
VALUES (:name, :environment, :indexer, :columns, :has_history)
ON CONFLICT (name) DO UPDATE SET columns = excluded.columns, has_history = excluded.has_history;

-- delete_indexer_tables: delete the records of an indexer's tables
DELETE FROM headrace_indexer_table WHERE environment = :environment AND indexer = :indexer;

-- existing_tables: list the names of all tables and views, of any owner
SELECT name FROM sqlite_master WHERE type IN ('table', 'view');

-- insert_checkpoints: store which event is which checkpoint
INSERT INTO headrace_checkpoint (environment, indexer, no, source, number, text)
SELECT :environment, :indexer, json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]')
FROM json_each(:rows);

-- checkpoints: list the events that are kept, in order
SELECT no, source, number, text FROM headrace_checkpoint
WHERE environment = :environment AND indexer = :indexer ORDER BY no;

-- first_checkpoint_after: read the first checkpoint of a source after a position
SELECT min(no) FROM headrace_checkpoint
WHERE environment = :environment AND indexer = :indexer AND source = :source AND (number, text) > (:number, :text);

-- last_checkpoints: read the last event of each source up to a checkpoint
WITH newest AS (
    SELECT max(no) AS no FROM headrace_checkpoint
    WHERE environment = :environment AND indexer = :indexer AND no <= :no GROUP BY source
)
SELECT own.source, own.number, own.text FROM newest JOIN headrace_checkpoint AS own
    ON own.environment = :environment AND own.indexer = :indexer AND own.no = newest.no;

-- delete_checkpoints: delete the events after one checkpoint and up to another
DELETE FROM headrace_checkpoint
WHERE environment = :environment AND indexer = :indexer AND no > :from_no AND no <= :to_no;
