-- The tables of the engine: block, span and part, the batches they belong to, and rows for what only some runs have.
-- Times are microseconds UTC; 0 means "not yet" or "never". States of spans and batches are words; states of runs are
-- one byte each (see headrace.core.run). A column `positions` holds block offsets, 16 bits each.

-- CREATE SCHEMA IF NOT EXISTS would need a right on the database that the owner of the schema may not have.
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE '"' || nspname || '"' = '{schema}') THEN
        CREATE SCHEMA {schema};
    END IF;
END $$;

-- Every table name contains its schema. No state is kept on a connection, so a pooler may use another one for each
-- transaction.

-- Ids come in ranges: a process takes 65,536 of them at once and numbers its rows itself.
CREATE SEQUENCE {schema}.block_ids INCREMENT BY 65536;
CREATE SEQUENCE {schema}.span_ids INCREMENT BY 65536;

CREATE TABLE {schema}.version (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    number bigint NOT NULL,
    -- the identity of this store: a random name, given once
    store_id text COLLATE "C" NOT NULL
);
INSERT INTO {schema}.version (number, store_id) VALUES (0, gen_random_uuid());

CREATE TABLE {schema}.batch (
    id text COLLATE "C" PRIMARY KEY,
    environment text COLLATE "C" NOT NULL,
    key text COLLATE "C",
    kind text COLLATE "C" NOT NULL,
    task text COLLATE "C" NOT NULL,
    state text COLLATE "C" NOT NULL,
    expected_count bigint,
    received_count bigint NOT NULL,
    completed_count bigint NOT NULL,
    failed_count bigint NOT NULL,
    cancelled_count bigint NOT NULL,
    expired_count bigint NOT NULL,
    order_bases text COLLATE "C" NOT NULL,
    cursor bytea NOT NULL,
    metadata text COLLATE "C" NOT NULL,
    session_id text COLLATE "C" NOT NULL,
    created_us bigint NOT NULL,
    appended_us bigint NOT NULL,
    sealed_us bigint NOT NULL,
    finished_us bigint NOT NULL,
    seal_timeout_ms bigint NOT NULL,
    block_width bigint NOT NULL,
    received bytea NOT NULL
);
CREATE UNIQUE INDEX batch_by_key ON {schema}.batch (environment, key) WHERE key IS NOT NULL;
CREATE INDEX batch_listed ON {schema}.batch (environment, id DESC);
CREATE INDEX batch_unfinished ON {schema}.batch (state) WHERE finished_us = 0 AND state IN ('open', 'cancelled', 'abandoned');
CREATE INDEX batch_finished ON {schema}.batch (finished_us) WHERE finished_us > 0;
CREATE INDEX batch_of_session ON {schema}.batch (session_id) WHERE session_id <> '';

CREATE TABLE {schema}.block (
    id bigint PRIMARY KEY,
    batch_id text COLLATE "C" NOT NULL,
    first_index bigint NOT NULL,
    last_index bigint NOT NULL,
    runs_count bigint NOT NULL,
    gaps bytea,
    extras bytea,
    items bytea NOT NULL
);
CREATE INDEX block_by_index ON {schema}.block (batch_id, first_index);

CREATE TABLE {schema}.span (
    id bigint PRIMARY KEY,
    block_id bigint NOT NULL,
    batch_id text COLLATE "C" NOT NULL,
    environment text COLLATE "C" NOT NULL,
    queue text COLLATE "C" NOT NULL,
    task text COLLATE "C" NOT NULL,
    priority bigint NOT NULL,
    due_us bigint NOT NULL,
    expires_us bigint NOT NULL,
    at_most_once bigint NOT NULL,
    order_no bigint NOT NULL,
    first_index bigint NOT NULL,
    attempt bigint NOT NULL,
    crashes_count bigint NOT NULL,
    crashes_alone_count bigint NOT NULL,
    positions bytea,
    states bytea NOT NULL,
    unsettled_count bigint NOT NULL,
    state text COLLATE "C" NOT NULL,
    session_id text COLLATE "C" NOT NULL,
    claim_no bigint NOT NULL,
    token bigint NOT NULL,
    dead_letter bigint NOT NULL,
    note text COLLATE "C" NOT NULL,
    since_us bigint NOT NULL,
    leased_us bigint NOT NULL DEFAULT 0
);
CREATE INDEX span_claimable ON {schema}.span (environment, queue, task, priority DESC, order_no, batch_id, first_index, id)
    WHERE state = 'waiting';
CREATE INDEX span_delayed ON {schema}.span (due_us) WHERE state = 'delayed';
CREATE INDEX span_leased ON {schema}.span (session_id, claim_no) WHERE session_id <> '';
CREATE INDEX span_expiring ON {schema}.span (expires_us) WHERE expires_us > 0 AND state IN ('waiting', 'delayed');
CREATE INDEX span_unsettled ON {schema}.span (batch_id, state) WHERE state <> 'done';
CREATE INDEX span_of_block ON {schema}.span (block_id);

CREATE TABLE {schema}.part (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    block_id bigint NOT NULL,
    span_id bigint NOT NULL,
    token bigint NOT NULL,
    part_no bigint NOT NULL,
    positions bytea,
    codes bytea NOT NULL,
    results bytea NOT NULL,
    settled_us bigint NOT NULL
);
CREATE UNIQUE INDEX part_once ON {schema}.part (block_id, span_id, token, part_no);

-- A lane is a (queue, task) pair that was used at least once. Claims read lane by lane, so the backlog of one lane never
-- slows another.
CREATE TABLE {schema}.lane (
    environment text COLLATE "C" NOT NULL,
    queue text COLLATE "C" NOT NULL,
    task text COLLATE "C" NOT NULL,
    PRIMARY KEY (environment, queue, task)
);

CREATE TABLE {schema}.queue (
    environment text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    clock bigint NOT NULL,
    paused bigint NOT NULL,
    PRIMARY KEY (environment, name)
);

-- `serves`: the queues and tasks that a worker claims from, as JSON; empty for a process that claims nothing.
-- `key_id`: the API key that started the session over the network; empty for a process that opens the store itself.
CREATE TABLE {schema}.session (
    id text COLLATE "C" PRIMARY KEY,
    kind text COLLATE "C" NOT NULL,
    host text COLLATE "C" NOT NULL,
    pid bigint NOT NULL,
    started_us bigint NOT NULL,
    heartbeat_us bigint NOT NULL,
    ended_us bigint NOT NULL,
    serves text COLLATE "C" NOT NULL DEFAULT '',
    environment text COLLATE "C" NOT NULL,
    key_id text COLLATE "C" NOT NULL
);

-- The progress of a copy of another store into this one: the last block of the source that was copied.
CREATE TABLE {schema}.move (
    id text COLLATE "C" PRIMARY KEY,
    block_id bigint NOT NULL
);

-- A duty of upkeep is held by one process at a time, until `free_us`.
CREATE TABLE {schema}.duty (
    name text COLLATE "C" PRIMARY KEY,
    holder text COLLATE "C" NOT NULL,
    free_us bigint NOT NULL
);

-- The ticks of a schedule up to `last_us` are processed. The process that advances it enqueues the runs, in one transaction.
CREATE TABLE {schema}.schedule (
    environment text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    app text COLLATE "C" NOT NULL,
    task text COLLATE "C" NOT NULL,
    expression text COLLATE "C" NOT NULL,
    zone text COLLATE "C" NOT NULL,
    last_us bigint NOT NULL,
    ticked_us bigint NOT NULL,
    gone_us bigint NOT NULL,
    PRIMARY KEY (environment, name)
);

-- The tables from here on have a row only for the runs that use them.
CREATE TABLE {schema}.idempotency (
    environment text COLLATE "C" NOT NULL,
    task text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    batch_id text COLLATE "C" NOT NULL,
    run_index bigint NOT NULL,
    expires_us bigint NOT NULL,
    PRIMARY KEY (environment, task, key)
);
CREATE INDEX idempotency_of_batch ON {schema}.idempotency (batch_id);

CREATE TABLE {schema}.tag (
    environment text COLLATE "C" NOT NULL,
    tag text COLLATE "C" NOT NULL,
    batch_id text COLLATE "C" NOT NULL,
    run_index bigint NOT NULL,
    PRIMARY KEY (environment, tag, batch_id, run_index)
);
CREATE INDEX tag_of_batch ON {schema}.tag (batch_id);

CREATE TABLE {schema}.object (
    key text COLLATE "C" PRIMARY KEY,
    batch_id text COLLATE "C" NOT NULL
);
CREATE INDEX object_of_batch ON {schema}.object (batch_id);

-- Payloads and results over the inline limit, where no object store is configured. Their data is in pieces, so that no
-- statement and no process holds a second copy. `bytes_count` is -1 while the pieces are being written.
CREATE TABLE {schema}.stored_object (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key text COLLATE "C" NOT NULL,
    bytes_count bigint NOT NULL,
    written_us bigint NOT NULL
);
CREATE UNIQUE INDEX stored_object_by_key ON {schema}.stored_object (key) WHERE bytes_count >= 0;
CREATE INDEX stored_object_unfinished ON {schema}.stored_object (written_us) WHERE bytes_count < 0;

CREATE TABLE {schema}.stored_piece (
    object_id bigint NOT NULL REFERENCES {schema}.stored_object ON DELETE CASCADE,
    piece_no integer NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (object_id, piece_no)
);
-- Compressing takes longer than writing, and the sizes of most payloads are small beside their number.
ALTER TABLE {schema}.stored_piece ALTER COLUMN data SET STORAGE EXTERNAL;

CREATE TABLE {schema}.cancellation (
    batch_id text COLLATE "C" NOT NULL,
    run_index bigint NOT NULL,
    PRIMARY KEY (batch_id, run_index)
);

-- A run that failed finally and is kept for an operator. Its batch is kept until the run is redriven or purged.
CREATE TABLE {schema}.dead_letter (
    batch_id text COLLATE "C" NOT NULL,
    run_index bigint NOT NULL,
    environment text COLLATE "C" NOT NULL,
    queue text COLLATE "C" NOT NULL,
    task text COLLATE "C" NOT NULL,
    died_us bigint NOT NULL,
    PRIMARY KEY (batch_id, run_index)
);
CREATE INDEX dead_letter_listed ON {schema}.dead_letter (environment, died_us, batch_id, run_index);

-- Rules of an environment, set by operators: which activations are dropped, and which go to another queue.
CREATE TABLE {schema}.rule (
    environment text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    value bytea NOT NULL,
    PRIMARY KEY (environment, name)
);

-- Authentication and rate limits. An API key itself is never stored, only its digest. A bucket is stored as the time at
-- which it is full again; a bucket without a row is full.
CREATE TABLE {schema}.api_key (
    id text COLLATE "C" PRIMARY KEY,
    environment text COLLATE "C" NOT NULL,
    digest text COLLATE "C" NOT NULL UNIQUE,
    scopes text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    created_us bigint NOT NULL,
    revoked_us bigint NOT NULL
);
CREATE INDEX api_key_listed ON {schema}.api_key (environment, id);

CREATE TABLE {schema}.signing_key (
    environment text COLLATE "C" PRIMARY KEY,
    value bytea NOT NULL
);

CREATE TABLE {schema}.bucket (
    environment text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    full_us bigint NOT NULL,
    PRIMARY KEY (environment, name)
);

-- Blocks and parts are written once. They are never updated in place, and compressing them costs more than it saves.
ALTER TABLE {schema}.block ALTER COLUMN items SET STORAGE EXTERNAL;
ALTER TABLE {schema}.part ALTER COLUMN results SET STORAGE EXTERNAL;
-- The received set of a batch in random order is 1.25 MB of bits, rewritten with each append. Compressing it took longer than
-- writing it.
ALTER TABLE {schema}.batch ALTER COLUMN received SET STORAGE EXTERNAL;
-- A span is updated two or three times, a batch and a queue again and again. Free space in the page keeps these updates inside it
-- (HOT), and an eager vacuum keeps the index of claims short.
ALTER TABLE {schema}.span SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0);
ALTER TABLE {schema}.batch SET (fillfactor = 20, autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE {schema}.queue SET (fillfactor = 20, autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE {schema}.session SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);

-- The state of an indexer. Its tables, named by the user's entities, contain the events up to its checkpoint.
CREATE TABLE {schema}.indexer (
    environment text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    no bigint NOT NULL,
    positions text COLLATE "C" NOT NULL,
    token bigint NOT NULL,
    beats bigint NOT NULL,
    holder text COLLATE "C" NOT NULL,
    floor_no bigint NOT NULL,
    floor_positions text COLLATE "C" NOT NULL,
    is_caught_up boolean NOT NULL,
    moved_us bigint NOT NULL,
    PRIMARY KEY (environment, name)
);

CREATE TABLE {schema}.indexer_table (
    name text COLLATE "C" PRIMARY KEY,
    environment text COLLATE "C" NOT NULL,
    indexer text COLLATE "C" NOT NULL,
    columns text COLLATE "C" NOT NULL,
    has_history boolean NOT NULL
);

-- The events of indexers that keep a history. A position is a number or a text; the other column is 0 or empty.
CREATE TABLE {schema}.checkpoint (
    environment text COLLATE "C" NOT NULL,
    indexer text COLLATE "C" NOT NULL,
    no bigint NOT NULL,
    source text COLLATE "C" NOT NULL,
    number bigint NOT NULL,
    text text COLLATE "C" NOT NULL,
    PRIMARY KEY (environment, indexer, no)
);
CREATE INDEX checkpoint_by_position ON {schema}.checkpoint (environment, indexer, source, number, text);
