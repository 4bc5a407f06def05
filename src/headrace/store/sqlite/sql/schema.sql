-- headrace_tables: list the tables of Headrace in this file
SELECT name FROM sqlite_master WHERE type = 'table' AND substr(name, 1, 9) = 'headrace_' ORDER BY name;

-- version: read the number of the newest applied migration
SELECT number FROM headrace_version;

-- set_version: store the number of an applied migration
UPDATE headrace_version SET number = :number;

-- store_id: read the identity of the store
SELECT store_id FROM headrace_version;
