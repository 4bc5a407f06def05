-- fragment bigint_array(json): a JSON array of whole numbers as an array
ARRAY(SELECT jsonb_array_elements_text({json}::jsonb)::bigint)

-- fragment text_array(json): a JSON array of strings as an array
ARRAY(SELECT jsonb_array_elements_text({json}::jsonb))

-- fragment leased(span): leased spans, by `span_leased` alone
-- Only a leased span has a session. `state = 'leased'` would also match the index `span_unsettled`, and statistics that
-- sampled no leased span make the planner read all of them there.
{span}session_id <> '' AND starts_with({span}state, 'leased')
