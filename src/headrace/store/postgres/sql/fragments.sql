-- fragment bigint_array(json): a JSON array of whole numbers as an array
ARRAY(SELECT jsonb_array_elements_text({json}::jsonb)::bigint)

-- fragment text_array(json): a JSON array of strings as an array
ARRAY(SELECT jsonb_array_elements_text({json}::jsonb))
