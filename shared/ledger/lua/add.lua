-- ARGV job, part, seconds until an unsealed job is forgotten, field, value, ...: add to a part of a job what it lacks. Changes
-- nothing if a field has another value, or if the job is sealed and lacks one: returns these fields with their values, or ''.
-- Returns nil if there is no such job.
local job, part = ARGV[1], key(ARGV[1], ARGV[2])
local state = redis.call('HGET', key(job), 'state')
if not state then return nil end
local others, lacking = {}, {}
for place = 4, #ARGV, 2 do
  local value = redis.call('HGET', part, ARGV[place])
  if not value then lacking[#lacking + 1] = place end
  if value and value ~= ARGV[place + 1] or not value and state ~= 'submitting' then
    others[#others + 1] = ARGV[place]
    others[#others + 1] = value or ''
  end
end
if #others == 0 and state == 'submitting' then
  for _, place in ipairs(lacking) do redis.call('HSET', part, ARGV[place], ARGV[place + 1]) end
  redis.call('EXPIRE', part, ARGV[3])
  redis.call('EXPIRE', key(job), ARGV[3])
end
return others
