-- ARGV key, the type that it must have or '', a field or member, its value as read: remove a key of another type, or a field or
-- member that has not changed since it was read. Returns what was found if something was removed.
local name, wanted, part, value = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local found = redis.call('TYPE', name).ok
if found == 'none' then return false end
if found ~= wanted then
  local content = found == 'string' and redis.call('GETRANGE', name, 0, 2047) or 'a ' .. found
  redis.call('UNLINK', name)
  return content
end
if not part then return false end
if found == 'hash' and redis.call('HGET', name, part) == value then
  redis.call('HDEL', name, part)
  return value
end
if found == 'zset' and redis.call('ZREM', name, part) == 1 then return part end
if found == 'set' and redis.call('SREM', name, part) == 1 then return part end
if found == 'string' and redis.call('GET', name) == part then
  redis.call('DEL', name)
  return part
end
return false
