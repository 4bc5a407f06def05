-- insert_api_key: a key that is let in from now on
INSERT INTO {schema}.api_key ({api_key_columns})
VALUES (:id, :environment, :digest, :scopes, :name, :created_us, 0)
ON CONFLICT DO NOTHING RETURNING 1;

-- api_key_by_digest: the key that hashes to a digest
SELECT {api_key_columns} FROM {schema}.api_key WHERE digest = :digest;

-- api_keys: the keys of an environment, oldest first
SELECT {api_key_columns} FROM {schema}.api_key
WHERE environment = :environment ORDER BY id;

-- revoke_api_key: a key is let in no more
UPDATE {schema}.api_key SET revoked_us = :now_us WHERE environment = :environment AND id = :id AND revoked_us = 0
RETURNING 1;

-- offer_signing_key: what an environment signs with, for the first who asks
INSERT INTO {schema}.signing_key (environment, value) VALUES (:environment, :value) ON CONFLICT DO NOTHING;

-- signing_key: what an environment signs its tokens with
SELECT value FROM {schema}.signing_key WHERE environment = :environment;

-- know_bucket: a bucket begins full
INSERT INTO {schema}.bucket (environment, name, full_us) VALUES (:environment, :name, 0) ON CONFLICT DO NOTHING;

-- lock_bucket: a bucket that this transaction is about to change
SELECT full_us FROM {schema}.bucket WHERE environment = :environment AND name = :name FOR UPDATE;

-- put_bucket: when a bucket will be full again
UPDATE {schema}.bucket SET full_us = :full_us WHERE environment = :environment AND name = :name;

-- delete_buckets: buckets that were full long ago, which is what they are without a row
DELETE FROM {schema}.bucket WHERE full_us < :before_us;
