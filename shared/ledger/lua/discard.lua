-- ARGV job: delete a job, or what is left of one that Redis has forgotten, unless it is sealed. Returns 0 if it is.
local job = ARGV[1]
local state = redis.call('HGET', key(job), 'state')
if state and state ~= 'submitting' then return 0 end
for _, part in ipairs(PARTS) do redis.call('DEL', key(job, part)) end
return 1
