-- Allow writes to a file again that was fenced.

DROP TRIGGER headrace_fence_batch_insert;
DROP TRIGGER headrace_fence_batch_update;
DROP TRIGGER headrace_fence_batch_delete;
DROP TRIGGER headrace_fence_block_insert;
DROP TRIGGER headrace_fence_block_delete;
DROP TRIGGER headrace_fence_span_insert;
DROP TRIGGER headrace_fence_span_update;
DROP TRIGGER headrace_fence_span_delete;
DROP TRIGGER headrace_fence_part_insert;
DROP TRIGGER headrace_fence_part_delete;
DROP TRIGGER headrace_fence_queue_update;
DROP TRIGGER headrace_fence_session_insert;
DROP TRIGGER headrace_fence_session_update;
