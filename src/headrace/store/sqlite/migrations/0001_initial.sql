-- The tables of the engine: block, span and part, the batches they belong to, and rows for what only some runs have.
-- Times are microseconds UTC; 0 means "not yet" or "never". States of spans and batches are words; states of runs are
-- one byte each (see headrace.core.run). A column `positions` holds block offsets, 16 bits each.

-- Every name begins with `headrace_`, so that the file may also hold the tables of an application.

-- The version of the schema, and the identity of this store: a random name, given once.
CREATE TABLE headrace_version (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    number INTEGER NOT NULL,
    store_id TEXT NOT NULL
);
INSERT INTO headrace_version VALUES (1, 0, lower(hex(randomblob(16))));

-- Ids come from this row and not from rowid, so that the id of a deleted span is never used again: an old lease can't match
-- another span. The row changes in the transaction of the rows that it numbers.
CREATE TABLE headrace_sequence (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    next_block_id INTEGER NOT NULL,
    next_span_id INTEGER NOT NULL
);
INSERT INTO headrace_sequence VALUES (1, 1, 1);

CREATE TABLE headrace_batch (
    id TEXT PRIMARY KEY,
    environment TEXT NOT NULL,
    key TEXT,
    kind TEXT NOT NULL,
    task TEXT NOT NULL,
    state TEXT NOT NULL,
    expected_count INTEGER,
    received_count INTEGER NOT NULL,
    completed_count INTEGER NOT NULL,
    failed_count INTEGER NOT NULL,
    cancelled_count INTEGER NOT NULL,
    expired_count INTEGER NOT NULL,
    order_bases TEXT NOT NULL,
    cursor BLOB NOT NULL,
    metadata TEXT NOT NULL,
    session_id TEXT NOT NULL,
    created_us INTEGER NOT NULL,
    appended_us INTEGER NOT NULL,
    sealed_us INTEGER NOT NULL,
    finished_us INTEGER NOT NULL,
    seal_timeout_ms INTEGER NOT NULL,
    block_width INTEGER NOT NULL,
    received BLOB NOT NULL
) WITHOUT ROWID;
CREATE UNIQUE INDEX headrace_batch_by_key ON headrace_batch (environment, key) WHERE key IS NOT NULL;
CREATE INDEX headrace_batch_listed ON headrace_batch (environment, id DESC);
CREATE INDEX headrace_batch_unfinished ON headrace_batch (state) WHERE finished_us = 0 AND state IN ('open', 'cancelled', 'abandoned');
CREATE INDEX headrace_batch_finished ON headrace_batch (finished_us) WHERE finished_us > 0;
CREATE INDEX headrace_batch_of_session ON headrace_batch (session_id) WHERE session_id <> '';

CREATE TABLE headrace_block (
    id INTEGER PRIMARY KEY,
    batch_id TEXT NOT NULL,
    first_index INTEGER NOT NULL,
    last_index INTEGER NOT NULL,
    runs_count INTEGER NOT NULL,
    gaps BLOB,
    extras BLOB,
    items BLOB NOT NULL
);
CREATE INDEX headrace_block_by_index ON headrace_block (batch_id, first_index);

CREATE TABLE headrace_span (
    id INTEGER PRIMARY KEY,
    block_id INTEGER NOT NULL,
    batch_id TEXT NOT NULL,
    environment TEXT NOT NULL,
    queue TEXT NOT NULL,
    task TEXT NOT NULL,
    priority INTEGER NOT NULL,
    due_us INTEGER NOT NULL,
    expires_us INTEGER NOT NULL,
    at_most_once INTEGER NOT NULL,
    order_no INTEGER NOT NULL,
    first_index INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    crashes_count INTEGER NOT NULL,
    crashes_alone_count INTEGER NOT NULL,
    positions BLOB,
    states BLOB NOT NULL,
    unsettled_count INTEGER NOT NULL,
    state TEXT NOT NULL,
    session_id TEXT NOT NULL,
    claim_no INTEGER NOT NULL,
    token INTEGER NOT NULL,
    dead_letter INTEGER NOT NULL,
    note TEXT NOT NULL,
    since_us INTEGER NOT NULL,
    leased_us INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX headrace_span_claimable ON headrace_span (environment, queue, task, priority DESC, order_no, batch_id, first_index, id)
    WHERE state = 'waiting';
CREATE INDEX headrace_span_delayed ON headrace_span (due_us) WHERE state = 'delayed';
CREATE INDEX headrace_span_leased ON headrace_span (session_id, claim_no) WHERE state = 'leased';
CREATE INDEX headrace_span_expiring ON headrace_span (expires_us) WHERE expires_us > 0 AND state IN ('waiting', 'delayed');
CREATE INDEX headrace_span_unsettled ON headrace_span (batch_id, state) WHERE state <> 'done';
CREATE INDEX headrace_span_of_block ON headrace_span (block_id);

CREATE TABLE headrace_part (
    id INTEGER PRIMARY KEY,
    block_id INTEGER NOT NULL,
    span_id INTEGER NOT NULL,
    token INTEGER NOT NULL,
    part_no INTEGER NOT NULL,
    positions BLOB,
    codes BLOB NOT NULL,
    results BLOB NOT NULL,
    settled_us INTEGER NOT NULL
);
CREATE UNIQUE INDEX headrace_part_once ON headrace_part (block_id, span_id, token, part_no);

-- A lane is a (queue, task) pair that was used at least once. Claims read lane by lane, so the backlog of one lane never
-- slows another.
CREATE TABLE headrace_lane (
    environment TEXT NOT NULL,
    queue TEXT NOT NULL,
    task TEXT NOT NULL,
    PRIMARY KEY (environment, queue, task)
) WITHOUT ROWID;

CREATE TABLE headrace_queue (
    environment TEXT NOT NULL,
    name TEXT NOT NULL,
    clock INTEGER NOT NULL,
    paused INTEGER NOT NULL,
    PRIMARY KEY (environment, name)
) WITHOUT ROWID;

-- `serves`: the queues and tasks that a worker claims from, as JSON; empty for a process that claims nothing.
-- `key_id`: the API key that started the session over the network; empty for a process that opens the store itself.
CREATE TABLE headrace_session (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started_us INTEGER NOT NULL,
    heartbeat_us INTEGER NOT NULL,
    ended_us INTEGER NOT NULL,
    serves TEXT NOT NULL DEFAULT '',
    environment TEXT NOT NULL,
    key_id TEXT NOT NULL
) WITHOUT ROWID;

-- The store copy that fenced this file, if any (see write_fence.sql).
CREATE TABLE headrace_move (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    id TEXT NOT NULL,
    target TEXT NOT NULL,
    started_us INTEGER NOT NULL,
    finished_us INTEGER NOT NULL
);

-- A duty of upkeep is held by one process at a time, until `free_us`.
CREATE TABLE headrace_duty (
    name TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    free_us INTEGER NOT NULL
) WITHOUT ROWID;

-- The ticks of a schedule up to `last_us` are processed. The process that advances it enqueues the runs, in one transaction.
CREATE TABLE headrace_schedule (
    environment TEXT NOT NULL,
    name TEXT NOT NULL,
    app TEXT NOT NULL,
    task TEXT NOT NULL,
    expression TEXT NOT NULL,
    zone TEXT NOT NULL,
    last_us INTEGER NOT NULL,
    ticked_us INTEGER NOT NULL,
    gone_us INTEGER NOT NULL,
    PRIMARY KEY (environment, name)
) WITHOUT ROWID;

-- The tables from here on have a row only for the runs that use them.
CREATE TABLE headrace_idempotency (
    environment TEXT NOT NULL,
    task TEXT NOT NULL,
    key TEXT NOT NULL,
    batch_id TEXT NOT NULL,
    run_index INTEGER NOT NULL,
    expires_us INTEGER NOT NULL,
    PRIMARY KEY (environment, task, key)
) WITHOUT ROWID;
CREATE INDEX headrace_idempotency_of_batch ON headrace_idempotency (batch_id);

CREATE TABLE headrace_tag (
    environment TEXT NOT NULL,
    tag TEXT NOT NULL,
    batch_id TEXT NOT NULL,
    run_index INTEGER NOT NULL,
    PRIMARY KEY (environment, tag, batch_id, run_index)
) WITHOUT ROWID;
CREATE INDEX headrace_tag_of_batch ON headrace_tag (batch_id);

CREATE TABLE headrace_object (
    key TEXT PRIMARY KEY,
    batch_id TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX headrace_object_of_batch ON headrace_object (batch_id);

CREATE TABLE headrace_cancellation (
    batch_id TEXT NOT NULL,
    run_index INTEGER NOT NULL,
    PRIMARY KEY (batch_id, run_index)
) WITHOUT ROWID;

-- A run that failed finally and is kept for an operator. Its batch is kept until the run is redriven or purged.
CREATE TABLE headrace_dead_letter (
    batch_id TEXT NOT NULL,
    run_index INTEGER NOT NULL,
    environment TEXT NOT NULL,
    queue TEXT NOT NULL,
    task TEXT NOT NULL,
    died_us INTEGER NOT NULL,
    PRIMARY KEY (batch_id, run_index)
) WITHOUT ROWID;
CREATE INDEX headrace_dead_letter_listed ON headrace_dead_letter (environment, died_us, batch_id, run_index);

-- Rules of an environment, set by operators: which activations are dropped, and which go to another queue.
CREATE TABLE headrace_rule (
    environment TEXT NOT NULL,
    name TEXT NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (environment, name)
) WITHOUT ROWID;

-- Authentication and rate limits. An API key itself is never stored, only its digest. A bucket is stored as the time at
-- which it is full again; a bucket without a row is full.
CREATE TABLE headrace_api_key (
    id TEXT PRIMARY KEY,
    environment TEXT NOT NULL,
    digest TEXT NOT NULL UNIQUE,
    scopes TEXT NOT NULL,
    name TEXT NOT NULL,
    created_us INTEGER NOT NULL,
    revoked_us INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX headrace_api_key_listed ON headrace_api_key (environment, id);

CREATE TABLE headrace_signing_key (
    environment TEXT PRIMARY KEY,
    value BLOB NOT NULL
) WITHOUT ROWID;

CREATE TABLE headrace_bucket (
    environment TEXT NOT NULL,
    name TEXT NOT NULL,
    full_us INTEGER NOT NULL,
    PRIMARY KEY (environment, name)
) WITHOUT ROWID;

-- The state of an indexer. Its tables, named by the user's entities, contain the events up to its checkpoint.
CREATE TABLE headrace_indexer (
    environment TEXT NOT NULL,
    name TEXT NOT NULL,
    no INTEGER NOT NULL,
    positions TEXT NOT NULL,
    token INTEGER NOT NULL,
    beats INTEGER NOT NULL,
    holder TEXT NOT NULL,
    floor_no INTEGER NOT NULL,
    floor_positions TEXT NOT NULL,
    is_caught_up INTEGER NOT NULL,
    moved_us INTEGER NOT NULL,
    PRIMARY KEY (environment, name)
) WITHOUT ROWID;

CREATE TABLE headrace_indexer_table (
    name TEXT PRIMARY KEY,
    environment TEXT NOT NULL,
    indexer TEXT NOT NULL,
    columns TEXT NOT NULL,
    has_history INTEGER NOT NULL
) WITHOUT ROWID;

-- The events of indexers that keep a history. A position is a number or a text; the other column is 0 or empty.
CREATE TABLE headrace_checkpoint (
    environment TEXT NOT NULL,
    indexer TEXT NOT NULL,
    no INTEGER NOT NULL,
    source TEXT NOT NULL,
    number INTEGER NOT NULL,
    text TEXT NOT NULL,
    PRIMARY KEY (environment, indexer, no)
) WITHOUT ROWID;
CREATE INDEX headrace_checkpoint_by_position ON headrace_checkpoint (environment, indexer, source, number, text);
