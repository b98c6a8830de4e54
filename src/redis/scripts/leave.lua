-- Takes a claim back, whatever has become of it.
--
-- KEYS: 5 the tombstone of this owner
-- ARGV: 1 owner, 2 for how long it counts as dead (ms; 0: its claim was answered, none can come any more)
local owner = ARGV[1]
remove(owner) -- first: see hand_over
if ARGV[2] ~= '0' then redis.call('SET', KEYS[5], '1', 'PX', ARGV[2]) end
-- Any generation of it.
local attempt = string.match(owner, '^%x+%.')
if string.sub(redis.call('GET', lock) or '', 1, #attempt) == attempt then hand_over() end
return 1
