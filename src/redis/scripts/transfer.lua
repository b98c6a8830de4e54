-- Gives the lock from one owner to another of the same process.
--
-- KEYS: 5 the tombstone of the next owner
-- ARGV: 1 owner, 2 next owner, 3 its ttl (ms)
-- Answers {"granted", token, next owner}, or {"gone"} if it isn't held or the next owner is dead
if redis.call('GET', lock) ~= ARGV[1] or redis.call('EXISTS', KEYS[5]) == 1 then return {'gone'} end
local token = draw()
if not token then return {'exhausted'} end
redis.call('SET', lock, ARGV[2], 'PX', ARGV[3])
return {'granted', token, ARGV[2]}
