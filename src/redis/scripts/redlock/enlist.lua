-- Asks a node whether it has a vote. One that hasn't is noted as waiting for admission.
--
-- KEYS: 1 the node; ARGV: 1 the server's run id, 2 a number that nobody else uses
-- Answers {"member", high, longest}, or {"outside", number, ms since it was noted, 1 if it has never been a member, high,
-- longest}
local node, run = KEYS[1], ARGV[1]
local time = redis.call('TIME')
local now = math.floor((time[1] * 1000000 + time[2]) / 1000)

local was = redis.call('HMGET', node, 'run', 'high', 'longest', 'waits_run', 'waits_number', 'waits_since', 'floor')
-- The floor stands for what others had drawn: it is passed on to those that lose what they know after this one.
local high, longest = math.max(tonumber(was[2] or 0), tonumber(was[7] or 0)), tonumber(was[3] or 0)
if was[1] == run then return {'member', high, longest} end

local number, since = was[5], tonumber(was[6] or 0)
if was[4] ~= run or since > now then -- a new start of the server, or its clock has stepped back
  number, since = ARGV[2], now
  redis.call('HSET', node, 'waits_run', run, 'waits_number', number, 'waits_since', string.format('%.0f', since))
end
return {'outside', number, now - since, was[1] and 0 or 1, high, longest}
