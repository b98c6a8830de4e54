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

local holder = redis.call('GET', lock) -- false if it is free; a foreign program may have it with an empty value
if holder == (from ~= '' and from) then
  -- A client whose clock is wrong by more than an hour sets it neither back nor forward.
  read_clock()
  proposal = math.min(math.max(proposal, micros - 3600000000), micros + 3600000000)
  local floor = tonumber(redis.call('HGET', node, 'floor') or 0)
  local counter = math.max((tonumber(redis.call('GET', fence) or 0)) + 1, proposal, floor)
  if counter > 9007199254740991 then return {'exhausted'} end
  note_token(counter)
  note_longest(ttl)
  if ARGV[6] then remove(ARGV[6]) end
  redis.call('SET', lock, owner, 'PX', ttl)
  return {'granted', counter}
end

if ARGV[6] then line_up(ARGV[6], tonumber(ARGV[7]), ARGV[8]) end
return {'busy', holder or '', redis.call('PTTL', lock)}
