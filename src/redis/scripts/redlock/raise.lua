-- Raises the counter of a lock, for the owner who holds it: the second phase.
--
-- ARGV: 1 the server's run id, 2 owner, 3 token
-- Answers 1 if the counter is not below the token now, 0 if the owner doesn't hold the lock here any more
if redis.call('HGET', node, 'run') ~= ARGV[1] or redis.call('GET', lock) ~= ARGV[2] then return 0 end
local token = tonumber(ARGV[3])
if token > (tonumber(redis.call('GET', fence) or 0)) then note_token(token) end
return 1
