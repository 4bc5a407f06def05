-- Block all writes to a file that is being copied to another store, also by processes that have it open.
-- Applied in the transaction that checks for live sessions, and removed by `write_unfence.sql`.

CREATE TRIGGER headrace_fence_batch_insert BEFORE INSERT ON headrace_batch BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_batch_update BEFORE UPDATE ON headrace_batch BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_batch_delete BEFORE DELETE ON headrace_batch BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_block_insert BEFORE INSERT ON headrace_block BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_block_delete BEFORE DELETE ON headrace_block BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_span_insert BEFORE INSERT ON headrace_span BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_span_update BEFORE UPDATE ON headrace_span BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_span_delete BEFORE DELETE ON headrace_span BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_part_insert BEFORE INSERT ON headrace_part BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_part_delete BEFORE DELETE ON headrace_part BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_queue_update BEFORE UPDATE ON headrace_queue BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_session_insert BEFORE INSERT ON headrace_session BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER headrace_fence_session_update BEFORE UPDATE ON headrace_session BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
