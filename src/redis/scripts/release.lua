-- Frees the lock, or hands it over to the first in the queue, if this owner holds it.
--
-- ARGV: 1 owner, 2 for how long it stays locked all the same (ms; 0: not at all)
-- Answers 1 if it was held, 0 if it wasn't
local owner, keep = ARGV[1], tonumber(ARGV[2])
-- Another value than the owner's: a renewal that comes late doesn't touch it.
local kept = string.match(owner, '^(%x+)') .. ':kept'

local holder = redis.call('GET', lock)
if holder == kept then return 1 end -- asked again
if holder ~= owner then return 0 end
if keep > 0 then
  redis.call('DEL', lock) -- first: see hand_over
  note_keep(keep)
  redis.call('SET', lock, kept, 'PX', keep)
else
  hand_over()
end
return 1
