-- insert_api_key: add an API key
INSERT INTO headrace_api_key ({api_key_columns})
VALUES (:id, :environment, :digest, :scopes, :name, :created_us, 0)
ON CONFLICT DO NOTHING RETURNING 1;

-- api_key_by_digest: read the API key with a digest
SELECT {api_key_columns} FROM headrace_api_key WHERE digest = :digest;

-- any_api_key: find out if there is an API key, of any environment
SELECT 1 FROM headrace_api_key LIMIT 1;

-- api_keys: list the API keys of an environment, oldest first
SELECT {api_key_columns} FROM headrace_api_key
WHERE environment = :environment ORDER BY id;

-- revoke_api_key: revoke an API key, once
UPDATE headrace_api_key SET revoked_us = :now_us WHERE environment = :environment AND id = :id AND revoked_us = 0
RETURNING 1;

-- offer_signing_key: store the signing key of an environment, unless it has one
INSERT INTO headrace_signing_key (environment, value) VALUES (:environment, :value) ON CONFLICT DO NOTHING;

-- signing_key: read the signing key of an environment
SELECT value FROM headrace_signing_key WHERE environment = :environment;

-- know_bucket: create a token bucket, which is full at first
INSERT INTO headrace_bucket (environment, name, full_us) VALUES (:environment, :name, 0) ON CONFLICT DO NOTHING;

-- lock_bucket: lock a token bucket, and read when it is full again
SELECT full_us FROM headrace_bucket WHERE environment = :environment AND name = :name;

-- put_bucket: store when a token bucket is full again
UPDATE headrace_bucket SET full_us = :full_us WHERE environment = :environment AND name = :name;

-- delete_buckets: delete token buckets that are full for long, as they are without a row
DELETE FROM headrace_bucket WHERE full_us < :before_us;
