-- Tries to get the lock.
--
-- KEYS: 5 the tombstone of this owner
-- ARGV: 1 owner, 2 ttl (ms), 3 how: "try", "join" the queue if it is busy, or "stay" in it; the last two with
-- 4 grace (ms), 5 the channel on which this owner's process listens
-- Answers {"granted", token, owner}, {"mine", token, owner, ms left}, {"busy", ms left}, {"gone"}, {"dead"} or {"exhausted"}
local owner, ttl, how = ARGV[1], ARGV[2], ARGV[3]

if how ~= 'stay' and redis.call('EXISTS', lock, queue, KEYS[5]) == 0 then
  -- Free, nobody waits, and this owner isn't dead: by far the most frequent case.
  local token = draw()
  if not token then return {'exhausted'} end
  redis.call('SET', lock, owner, 'PX', ttl)
  return {'granted', token, owner}
end

local holder = redis.call('GET', lock)
if holder == owner then
  -- Handed over, and the message is late or lost. Nothing changes, so that this may be asked at any time.
  return {'mine', tonumber(redis.call('GET', fence)) or draw(), owner, redis.call('PTTL', lock)}
end
if how == 'stay' then
  -- An owner that was handed the lock before, or dropped from the queue, never comes back.
  if not redis.call('ZSCORE', queue, owner) then return {'gone'} end
elseif redis.call('EXISTS', KEYS[5]) == 1 then
  return {'dead'} -- broken off before it came here
end

if not holder then
  local first = head()
  if first == nil or first == owner or not hand_over() then
    local token = draw()
    if not token then return {'exhausted'} end
    remove(owner)
    redis.call('SET', lock, owner, 'PX', ttl)
    return {'granted', token, owner}
  end
  -- Somebody who came before has it now; or this owner, if none of those listened: the message says so.
  if redis.call('GET', lock) == owner then return {'busy', redis.call('PTTL', lock)} end
end

if how ~= 'try' then line_up(owner, tonumber(ARGV[4]), ARGV[5]) end
return {'busy', redis.call('PTTL', lock)}
