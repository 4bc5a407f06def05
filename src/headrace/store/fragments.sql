-- fragment span_columns(table): the columns of a span, in the order of `SpanRow`; `table` is a prefix such as `span.`
{table}id, {table}block_id, {table}batch_id, {table}environment, {table}queue, {table}task, {table}priority,
    {table}due_us, {table}expires_us, {table}at_most_once, {table}order_no, {table}first_index, {table}attempt,
    {table}crashes_count, {table}crashes_alone_count, {table}positions, {table}states, {table}unsettled_count,
    {table}state, {table}session_id, {table}claim_no, {table}token, {table}dead_letter, {table}note,
    {table}since_us, {table}leased_us

-- fragment batch_columns: the columns of a batch but for its received indexes, in the order of `BatchRow`
id, environment, key, kind, task, state, expected_count, received_count, completed_count, failed_count,
    cancelled_count, expired_count, order_bases, cursor, metadata, session_id, created_us, appended_us,
    sealed_us, finished_us, seal_timeout_ms, block_width

-- fragment part_columns: the columns of a part, in the order of `PartRow`
block_id, span_id, token, part_no, settled_us, positions, codes, results

-- fragment api_key_columns: the columns of an API key, in the order of `ApiKeyRow`
id, environment, digest, scopes, name, created_us, revoked_us

-- fragment schedule_columns: the columns of a schedule, in the order of `ScheduleRow`
environment, name, app, task, expression, zone, last_us, ticked_us, gone_us

-- fragment indexer_columns: the columns of an indexer, in the order of `IndexerRow`
environment, name, no, positions, token, beats, holder, floor_no, floor_positions, is_caught_up, moved_us

-- fragment claim_order(table): the order of claims: by priority, then by virtual time, then by batch and index
{table}priority DESC, {table}order_no, {table}batch_id, {table}first_index, {table}id

-- fragment ends_batch(settled): the completion rule: true when `settled` more outcomes are the last ones of a batch
-- The batch is closed (sealed or stopped) and has not ended, and all runs that it received have an outcome then.
finished_us = 0 AND state <> 'open'
    AND received_count = {settled} + completed_count + failed_count + cancelled_count + expired_count

-- fragment outcome_counts(source): add outcomes to the counters of a batch; `source` is a prefix: `:` or `counts.`
completed_count = completed_count + {source}completed, failed_count = failed_count + {source}failed,
    cancelled_count = cancelled_count + {source}cancelled, expired_count = expired_count + {source}expired
