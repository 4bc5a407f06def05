-- begin_object: begin an object, which can be read once it is finished
INSERT INTO {schema}.stored_object (key, bytes_count, written_us)
VALUES (:key, -1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) RETURNING id;

-- add_piece: store the next piece of an object; returns nothing if upkeep has deleted the object as unfinished
INSERT INTO {schema}.stored_piece (object_id, piece_no, data)
SELECT id, :piece_no, :data FROM {schema}.stored_object WHERE id = :object_id FOR KEY SHARE
RETURNING piece_no;

-- lock_object: let one transaction at a time finish an object of this key
SELECT pg_advisory_xact_lock(hashtextextended(:key, 0));

-- delete_object: delete the finished object of a key
DELETE FROM {schema}.stored_object WHERE key = :key AND bytes_count >= 0;

-- finish_object: finish an object whose pieces are all stored
UPDATE {schema}.stored_object
SET bytes_count = :bytes_count, written_us = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
WHERE id = :object_id RETURNING id;

-- drop_object: delete an object that will not be finished
DELETE FROM {schema}.stored_object WHERE id = :object_id AND bytes_count < 0;

-- renew_object: make a finished object count as new; returns nothing if there is none of this key and size
UPDATE {schema}.stored_object SET written_us = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
WHERE key = :key AND bytes_count = :bytes_count AND bytes_count >= 0 RETURNING id;

-- find_object: find the finished object of a key
SELECT id, bytes_count FROM {schema}.stored_object WHERE key = :key AND bytes_count >= 0;

-- next_pieces: read the next pieces of an object
SELECT data FROM {schema}.stored_piece WHERE object_id = :object_id AND piece_no >= :piece_no
ORDER BY piece_no LIMIT :pieces_max;

-- delete_stored_objects: delete finished objects by their keys
DELETE FROM {schema}.stored_object WHERE bytes_count >= 0 AND key = ANY(:keys);

-- list_objects: list finished objects between two keys, in order
SELECT key, written_us, bytes_count FROM {schema}.stored_object
WHERE bytes_count >= 0 AND key > :after_key AND key < :before_key ORDER BY key LIMIT :rows_max;

-- delete_unfinished_objects: delete objects that a writer began before a time and never finished
DELETE FROM {schema}.stored_object WHERE bytes_count < 0 AND written_us < :before_us RETURNING id;
