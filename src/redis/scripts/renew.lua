-- Renews many locks, each if its owner still holds it.
--
-- KEYS: the locks; ARGV: for each of them its owner and its ttl (ms)
-- Answers for each 1: renewed, 0: its owner doesn't hold it any more
local answers = {}
for i, lock in ipairs(KEYS) do
  local owner, ttl = ARGV[2 * i - 1], tonumber(ARGV[2 * i])
  if redis.pcall('GET', lock) == owner then
    -- Never shortens: of two renewals the later answered may be the earlier sent.
    if redis.call('PTTL', lock) < ttl then redis.call('PEXPIRE', lock, ttl) end
    answers[i] = 1
  else
    answers[i] = 0
  end
end
return answers
