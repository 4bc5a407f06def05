-- Block all writes to a file that is being copied to another store, also by processes that have it open.
-- Applied in the transaction that checks for live sessions, and removed by `write_unfence.sql`.

CREATE TRIGGER fence_batch_insert BEFORE INSERT ON batch BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_batch_update BEFORE UPDATE ON batch BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_batch_delete BEFORE DELETE ON batch BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_block_insert BEFORE INSERT ON block BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_block_delete BEFORE DELETE ON block BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_span_insert BEFORE INSERT ON span BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_span_update BEFORE UPDATE ON span BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_span_delete BEFORE DELETE ON span BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_part_insert BEFORE INSERT ON part BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_part_delete BEFORE DELETE ON part BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_queue_update BEFORE UPDATE ON queue BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_session_insert BEFORE INSERT ON session BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
CREATE TRIGGER fence_session_update BEFORE UPDATE ON session BEGIN SELECT RAISE(ABORT, 'headrace: fenced'); END;
