-- Votes for a claim: the first of the two phases.
--
-- KEYS: 5 the tombstone of the attempt
-- ARGV: 1 the server's run id, as the client knows it, 2 owner, 3 the owner it comes from ("": it must be free),
-- 4 ttl (ms), 5 the token that the client proposes; to be woken if it is busy: 6 waiter, 7 grace (ms), 8 channel
-- Answers {"granted", counter}, {"busy", holder, ms left}, {"outside"}, {"dead"} or {"exhausted"}
local owner, from, ttl, proposal = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])

-- A node that has been restarted, or has lost its data, has no vote until it is admitted again.
if redis.call('HGET', node, 'run') ~= ARGV[1] then return {'outside'} end
if redis.call('EXISTS', KEYS[5]) == 1 then return {'dead'} end

local holder = redis.call('GET', lock) or ''
if holder == from then
  local floor = tonumber(redis.call('HGET', node, 'floor') or 0)
  local counter = math.max((tonumber(redis.call('GET', fence) or 0)) + 1, proposal, floor)
  if counter > 9007199254740991 then return {'exhausted'} end
  note_token(counter)
  note_longest(ttl)
  if ARGV[6] then remove(ARGV[6]) end
  redis.call('SET', lock, owner, 'PX', ttl)
  return {'granted', counter}
end

if ARGV[6] then
  read_clock()
  local waiter, grace = ARGV[6], tonumber(ARGV[7])
  if not redis.call('ZSCORE', queue, waiter) then
    local last = redis.call('ZRANGE', queue, -1, -1, 'WITHSCORES')[2]
    redis.call('ZADD', queue, (last or 0) + 1, waiter)
  end
  redis.call('HSET', waiters, waiter, string.format('%.0f %.0f %s', now + grace, grace, ARGV[8]))
  if redis.call('PTTL', queue) < grace then
    redis.call('PEXPIRE', queue, grace)
    redis.call('PEXPIRE', waiters, grace)
  end
end
return {'busy', holder, redis.call('PTTL', lock)}
