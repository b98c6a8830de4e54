-- Gives a node its vote.
--
-- KEYS: 1 the node; ARGV: 1 the server's run id, 2 the number under which it waits, 3 no token may be below this,
-- 4 for how long after this server's clock none may be either (us), 5 the longest TTL known (ms)
-- Answers 1 if it has a vote now, 0 if it is not what was asked about any more
local node, run = KEYS[1], ARGV[1]
local was = redis.call('HMGET', node, 'run', 'high', 'floor', 'longest', 'waits_run', 'waits_number')
if was[1] == run then return 1 end
if was[5] ~= run or was[6] ~= ARGV[2] then return 0 end
local time = redis.call('TIME')
local floor = math.max(tonumber(ARGV[3]), time[1] * 1000000 + time[2] + tonumber(ARGV[4]),
  tonumber(was[2] or 0) + 1, tonumber(was[3] or 0))
local longest = math.max(tonumber(was[4] or 0), tonumber(ARGV[5]))
redis.call('HSET', node, 'run', run, 'floor', string.format('%.0f', floor), 'longest', string.format('%.0f', longest))
redis.call('HDEL', node, 'waits_run', 'waits_number', 'waits_since')
return 1
