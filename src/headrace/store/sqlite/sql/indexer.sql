-- indexer: an indexer's row by its name
SELECT {indexer_columns}
FROM indexer WHERE environment = :environment AND name = :name;

-- indexers: every indexer of an environment, by name
SELECT {indexer_columns}
FROM indexer WHERE environment = :environment ORDER BY name;

-- insert_indexer: a new indexer, before its first event
INSERT OR IGNORE INTO indexer ({indexer_columns})
VALUES (:environment, :name, 0, '{}', 0, 0, '', 0, '{}', 0, 0);

-- take_indexer: lease an indexer that is still as it was seen; answers the new token
UPDATE indexer SET token = token + 1, beats = beats + 1, holder = :holder
WHERE environment = :environment AND name = :name AND token = :token AND beats = :beats
RETURNING token;

-- beat_indexer: a sign of life of the holder, not of one that was overtaken
UPDATE indexer SET beats = beats + 1 WHERE environment = :environment AND name = :name AND token = :token
RETURNING 1;

-- leave_indexer: the holder gives its lease back
UPDATE indexer SET holder = '', beats = beats + 1
WHERE environment = :environment AND name = :name AND token = :token;

-- move_checkpoint: the guard of every commit and rollback: from the checkpoint that was left, under the lease
UPDATE indexer SET no = :no, positions = :positions, is_caught_up = :is_caught_up, moved_us = :now_us,
    beats = beats + 1
WHERE environment = :environment AND name = :name AND no = :old_no AND token = :token
RETURNING 1;

-- move_floor: the oldest checkpoint that can be gone back to
UPDATE indexer SET floor_no = :floor_no, floor_positions = :floor_positions
WHERE environment = :environment AND name = :name;

-- delete_indexer: an indexer is forgotten
DELETE FROM indexer WHERE environment = :environment AND name = :name;

-- indexer_tables: every table that an indexer made
SELECT name, environment, indexer, columns, has_history FROM indexer_table ORDER BY name;

-- put_indexer_table: what a table was made for
INSERT INTO indexer_table (name, environment, indexer, columns, has_history)
VALUES (:name, :environment, :indexer, :columns, :has_history)
ON CONFLICT (name) DO UPDATE SET columns = excluded.columns, has_history = excluded.has_history;

-- delete_indexer_tables: the tables of an indexer are dropped
DELETE FROM indexer_table WHERE environment = :environment AND indexer = :indexer;

-- existing_tables: the names of all tables and views, of whomever
SELECT name FROM sqlite_master WHERE type IN ('table', 'view');

-- insert_checkpoints: which event is which checkpoint
INSERT INTO checkpoint (environment, indexer, no, source, number, text)
SELECT :environment, :indexer, json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]')
FROM json_each(:rows);

-- checkpoints: the events that are kept, in order
SELECT no, source, number, text FROM checkpoint
WHERE environment = :environment AND indexer = :indexer ORDER BY no;

-- first_checkpoint_after: the first event of a source after a position
SELECT min(no) FROM checkpoint
WHERE environment = :environment AND indexer = :indexer AND source = :source AND (number, text) > (:number, :text);

-- last_checkpoints: the last event of each source up to a checkpoint
WITH newest AS (
    SELECT max(no) AS no FROM checkpoint
    WHERE environment = :environment AND indexer = :indexer AND no <= :no GROUP BY source
)
SELECT own.source, own.number, own.text FROM newest JOIN checkpoint AS own
    ON own.environment = :environment AND own.indexer = :indexer AND own.no = newest.no;

-- delete_checkpoints: events after one checkpoint and up to another
DELETE FROM checkpoint
WHERE environment = :environment AND indexer = :indexer AND no > :from_no AND no <= :to_no;
