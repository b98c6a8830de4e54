-- What the scripts about one lock share; it stands before each of them.
--
-- KEYS: 1 the lock (its owner, with a TTL), 2 the counter of fencing tokens, 3 the queue (owners by order of arrival),
-- 4 the waiters (owner -> "alive-until grace channel", times in ms)
local lock, fence, queue, waiters = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

-- Read once: the clock isn't frozen while a script runs.
local micros, now
local function read_clock()
  if not micros then
    local time = redis.call('TIME')
    micros = time[1] * 1000000 + time[2]
    now = math.floor(micros / 1000)
  end
end

-- The next fencing token, noted as the last one; nil if there is none left. A counter that nobody has needed for seven
-- days is forgotten: by then the clock is far beyond it.
local function draw()
  read_clock()
  local token = math.max((tonumber(redis.call('GET', fence) or 0)) + 1, micros)
  if token > 9007199254740991 then return nil end
  redis.call('SET', fence, string.format('%.0f', token), 'EX', 604800)
  return token
end

local function remove(owner)
  redis.call('ZREM', queue, owner)
  redis.call('HDEL', waiters, owner)
end

-- A waiter takes the last place in the queue, or keeps the one that it has, and counts as alive for its grace.
local function line_up(owner, grace, channel)
  read_clock()
  if not redis.call('ZSCORE', queue, owner) then
    local last = redis.call('ZRANGE', queue, -1, -1, 'WITHSCORES')[2]
    redis.call('ZADD', queue, (last or 0) + 1, owner)
  end
  redis.call('HSET', waiters, owner, string.format('%.0f %.0f %s', now + grace, grace, channel))
  -- A queue of which nobody is alive doesn't stay.
  if redis.call('PTTL', queue) < grace then
    redis.call('PEXPIRE', queue, grace)
    redis.call('PEXPIRE', waiters, grace)
  end
end

-- The first waiter that is alive; those before it are dropped.
local function head()
  read_clock()
  while true do
    local owner = redis.call('ZRANGE', queue, 0, 0)[1]
    if not owner then return nil end
    local alive, grace, channel = string.match(redis.call('HGET', waiters, owner) or '', '^(%d+) (%d+) (.+)$')
    alive, grace = tonumber(alive), tonumber(grace)
    if alive and alive >= now then
      if alive > now + grace then
        -- The clock has stepped back: that mustn't keep a dead one alive.
        redis.call('HSET', waiters, owner, string.format('%.0f %.0f %s', now + grace, grace, channel))
      end
      return owner, grace, channel
    end
    remove(owner)
  end
end

-- Gives the lock to the first waiter whose process listens, for its grace: it confirms by a renewal. False: nobody is
-- there, and the lock is free.
local function hand_over()
  -- First of all, since a server whose memory is full lets nothing else begin a script; what follows it may.
  redis.call('DEL', lock)
  if redis.call('EXISTS', queue) == 0 then return false end
  while true do
    local owner, grace, channel = head()
    local token = owner and draw()
    if not token then return false end
    remove(owner)
    local heard = redis.pcall('PUBLISH', channel, owner .. ' ' .. string.format('%.0f', token))
    if type(heard) == 'number' and heard > 0 then
      redis.call('SET', lock, owner, 'PX', grace)
      return true
    end
  end
end

-- A lock stays for so long after its release (ms). Redlock has to remember it.
local function note_keep() end
