-- ending_span: read a leased span of which some runs ended, none of them as a dead letter
SELECT block_id, batch_id, positions, states, unsettled_count FROM headrace_span
WHERE id = :id AND token = :token AND state = 'leased' AND (dead_letter = 0 OR :has_failures = 0);

-- end_states: update a span of which some runs ended, without writing to any index
UPDATE headrace_span SET unsettled_count = :unsettled_count, states = :states WHERE id = :id;

-- end_span: update a span of which the last run ended
UPDATE headrace_span SET unsettled_count = :unsettled_count, states = :states, state = 'done', session_id = '', claim_no = 0
WHERE id = :id;

-- insert_part: insert the recorded outcomes of one span
INSERT INTO headrace_part ({part_columns})
VALUES (:block_id, :span_id, :token, :part_no, :settled_us, :block_offsets, :codes, :results);
