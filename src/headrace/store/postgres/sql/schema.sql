-- migration_lock: one process at a time changes the schema; freed with the transaction
SELECT pg_advisory_xact_lock(:lock);

-- version_table: whether there is a table that holds the schema's version, from the catalog: names are cached, and stale
SELECT 1 FROM pg_catalog.pg_class AS class JOIN pg_catalog.pg_namespace AS space ON space.oid = class.relnamespace
WHERE space.nspname = :schema AND class.relname = 'version';

-- version: the number of the newest migration that was applied
SELECT number FROM {schema}.version;

-- set_version: a migration was applied
UPDATE {schema}.version SET number = :number;

-- durability: the server, and the settings that durability hangs on
SELECT current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit');

-- next_block_ids: the first of a range of ids for blocks
SELECT nextval('{schema}.block_ids');

-- next_span_ids: the first of a range of ids for spans
SELECT nextval('{schema}.span_ids');
