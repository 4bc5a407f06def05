-- migration_lock: lock migrations of the schema for this transaction: one process migrates at a time
SELECT pg_advisory_xact_lock(:lock);

-- patience_of_migration: allow a migration to take long, but only a short wait for locks
SELECT set_config('statement_timeout', '0', true), set_config('lock_timeout', :lock_timeout, true);

-- version_table: check in the catalog whether the table of the schema's version exists; cached names may be stale
SELECT 1 FROM pg_catalog.pg_class AS class JOIN pg_catalog.pg_namespace AS space ON space.oid = class.relnamespace
WHERE space.nspname = :schema AND class.relname = 'version';

-- version: read the number of the newest applied migration
SELECT number FROM {schema}.version;

-- store_id: read the identity of the store
SELECT store_id FROM {schema}.version;

-- set_version: store the number of an applied migration
UPDATE {schema}.version SET number = :number;

-- missing_rights: list the rights that a worker needs on the schema and this role lacks, as role, right and object
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

-- durability: read the server's version, and the settings that durability depends on
SELECT current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit'),
    pg_is_in_recovery();

-- next_block_ids: reserve a range of ids for blocks, and return its first
SELECT nextval('{schema}.block_ids');

-- next_span_ids: reserve a range of ids for spans, and return its first
SELECT nextval('{schema}.span_ids');

-- session_behind: read the process id of the session that answers; a pooler hides it from its clients
SELECT pg_backend_pid();

-- join_transaction: read the identity of the store, and notify with the commit of the caller's transaction
SELECT store_id, pg_notify(:channel, :words) FROM {schema}.version;

-- notify: notify listeners without a flush to disk; polling finds what a crash loses (R11, notifications follow the commit)
SELECT set_config('synchronous_commit', 'off', true), pg_notify(:channel, :words);
