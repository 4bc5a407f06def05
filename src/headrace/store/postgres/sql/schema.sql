-- migration_lock: one process at a time changes the schema; freed with the transaction
SELECT pg_advisory_xact_lock(:lock);

-- patience_of_migration: a migration takes as long as it takes, but stands in nobody's way while it waits for a table
SELECT set_config('statement_timeout', '0', true), set_config('lock_timeout', :lock_timeout, true);

-- version_table: whether there is a table that holds the schema's version, from the catalog: names are cached, and stale
SELECT 1 FROM pg_catalog.pg_class AS class JOIN pg_catalog.pg_namespace AS space ON space.oid = class.relnamespace
WHERE space.nspname = :schema AND class.relname = 'version';

-- version: the number of the newest migration that was applied
SELECT number FROM {schema}.version;

-- set_version: a migration was applied
UPDATE {schema}.version SET number = :number;

-- durability: the server, and the settings that durability hangs on
SELECT current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit'),
    pg_is_in_recovery();

-- next_block_ids: the first of a range of ids for blocks
SELECT nextval('{schema}.block_ids');

-- next_span_ids: the first of a range of ids for spans
SELECT nextval('{schema}.span_ids');

-- session_behind: the session that answers; a pooler keeps from its clients which one that is
SELECT pg_backend_pid();

-- tell: news that goes out with the commit of somebody else's transaction, which is left as durable as it is
SELECT pg_notify(:channel, :words);

-- notify: news for whoever listens (rule R11), without a flush to disk: what a crash loses is found by polling
SELECT set_config('synchronous_commit', 'off', true), pg_notify(:channel, :words);
