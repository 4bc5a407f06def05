-- indexer: read the state of an indexer
SELECT {indexer_columns}
FROM {schema}.indexer WHERE environment = :environment AND name = :name;

-- indexers: list the indexers of an environment, by name
SELECT {indexer_columns}
FROM {schema}.indexer WHERE environment = :environment ORDER BY name;

-- insert_indexer: create an indexer, before its first event
INSERT INTO {schema}.indexer ({indexer_columns})
VALUES (:environment, :name, 0, '{}', 0, 0, '', 0, '{}', false, 0)
ON CONFLICT DO NOTHING;

-- take_indexer: lease an indexer that has not changed since it was read, and return the new token
UPDATE {schema}.indexer SET token = token + 1, beats = beats + 1, holder = :holder
WHERE environment = :environment AND name = :name AND token = :token AND beats = :beats
RETURNING token;

-- beat_indexer: renew the lease of the current holder
UPDATE {schema}.indexer SET beats = beats + 1 WHERE environment = :environment AND name = :name AND token = :token
RETURNING 1;

-- leave_indexer: release the lease of the current holder
UPDATE {schema}.indexer SET holder = '', beats = beats + 1
WHERE environment = :environment AND name = :name AND token = :token;

-- move_checkpoint: advance or roll back the checkpoint under the lease, as the guard of every commit
UPDATE {schema}.indexer SET no = :no, positions = :positions, is_caught_up = :is_caught_up, moved_us = :now_us,
    beats = beats + 1
WHERE environment = :environment AND name = :name AND no = :old_no AND token = :token
RETURNING 1;

-- move_floor: store the oldest checkpoint that a rollback can reach
UPDATE {schema}.indexer SET floor_no = :floor_no, floor_positions = :floor_positions
WHERE environment = :environment AND name = :name;

-- delete_indexer: delete the state of an indexer
DELETE FROM {schema}.indexer WHERE environment = :environment AND name = :name;

-- indexer_tables: list the tables that indexers created
SELECT name, environment, indexer, columns, has_history FROM {schema}.indexer_table ORDER BY name;

-- put_indexer_table: store for which entity a table was created
INSERT INTO {schema}.indexer_table (name, environment, indexer, columns, has_history)
VALUES (:name, :environment, :indexer, :columns, :has_history)
ON CONFLICT (name) DO UPDATE SET columns = excluded.columns, has_history = excluded.has_history;

-- delete_indexer_tables: delete the records of an indexer's tables
DELETE FROM {schema}.indexer_table WHERE environment = :environment AND indexer = :indexer;

-- existing_tables: list the names of all tables and views, of any owner
SELECT class.relname FROM pg_catalog.pg_class AS class
JOIN pg_catalog.pg_namespace AS space ON space.oid = class.relnamespace
WHERE space.nspname = :schema;

-- insert_checkpoints: store which event is which checkpoint
INSERT INTO {schema}.checkpoint (environment, indexer, no, source, number, text)
SELECT :environment, :indexer, (value->>0)::bigint, value->>1, (value->>2)::bigint, value->>3
FROM jsonb_array_elements(:rows::jsonb) AS given (value);

-- checkpoints: list the events that are kept, in order
SELECT no, source, number, text FROM {schema}.checkpoint
WHERE environment = :environment AND indexer = :indexer ORDER BY no;

-- first_checkpoint_after: read the first checkpoint of a source after a position
SELECT min(no) FROM {schema}.checkpoint
WHERE environment = :environment AND indexer = :indexer AND source = :source AND (number, text) > (:number, :text);

-- last_checkpoints: read the last event of each source up to a checkpoint
WITH newest AS MATERIALIZED (
    SELECT max(no) AS no FROM {schema}.checkpoint
    WHERE environment = :environment AND indexer = :indexer AND no <= :no GROUP BY source
)
SELECT own.source, own.number, own.text FROM newest JOIN {schema}.checkpoint AS own
    ON own.environment = :environment AND own.indexer = :indexer AND own.no = newest.no;

-- delete_checkpoints: delete the events after one checkpoint and up to another
DELETE FROM {schema}.checkpoint
WHERE environment = :environment AND indexer = :indexer AND no > :from_no AND no <= :to_no;
