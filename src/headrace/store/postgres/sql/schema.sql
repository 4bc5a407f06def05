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

-- missing_rights: the rights on the schema that a worker needs and this role lacks, as role, right and object
SELECT current_user, needed.right_name, needed.object_name
FROM (
    SELECT 1 AS rank, 'USAGE' AS right_name, 'schema ' || nspname AS object_name
    FROM pg_catalog.pg_namespace WHERE nspname = :schema AND NOT has_schema_privilege(oid, 'USAGE')
    UNION ALL
    SELECT 2, dml.right_name, 'table ' || class.relname
    FROM pg_catalog.pg_class AS class JOIN pg_catalog.pg_namespace AS space ON space.oid = class.relnamespace
    CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS dml (right_name)
    WHERE space.nspname = :schema AND class.relkind = 'r' AND NOT has_table_privilege(class.oid, dml.right_name)
    UNION ALL
    SELECT 3, 'USAGE', 'sequence ' || class.relname
    FROM pg_catalog.pg_class AS class JOIN pg_catalog.pg_namespace AS space ON space.oid = class.relnamespace
    WHERE space.nspname = :schema AND class.relkind = 'S'
        AND CASE WHEN class.relkind = 'S' THEN NOT has_sequence_privilege(class.oid, 'USAGE') END
) AS needed
ORDER BY needed.rank, needed.object_name, needed.right_name;

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
