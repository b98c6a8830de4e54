-- What a node of Redlock does otherwise than a server on its own; it stands between queue.lua and the script.
--
-- KEYS: 6 the node, one for all locks: "run" (the server's run id at its admission), "floor" (below it no token is
-- drawn), "high" (the highest token drawn), "longest" (for how long a lock was ever taken, ms)
local node = KEYS[6]

local function note_longest(ms)
  if ms > (tonumber(redis.call('HGET', node, 'longest') or 0)) then redis.call('HSET', node, 'longest', ms) end
end
note_keep = note_longest

-- A lock can't be handed over, since that would take a majority: the first that listens is woken.
hand_over = function()
  redis.call('DEL', lock)
  while true do
    local owner, grace, channel = head()
    if not owner then return false end
    local heard = redis.pcall('PUBLISH', channel, owner .. ' free')
    if type(heard) == 'number' and heard > 0 then return false end
    remove(owner)
  end
end

local function note_token(token)
  redis.call('SET', fence, string.format('%.0f', token), 'EX', 604800)
  if token > (tonumber(redis.call('HGET', node, 'high') or 0)) then
    redis.call('HSET', node, 'high', string.format('%.0f', token))
  end
end
