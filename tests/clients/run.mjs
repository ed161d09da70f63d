// One npm client of the hosted API, unmodified, through its public calls; what came of it goes to stdout as JSON.
// Reads {package, url, key, model, input, file} from stdin.
import { readFileSync } from 'node:fs'

const asked = JSON.parse(readFileSync(0, 'utf8'))
const loaded = await import(asked.package)
const found = { ...loaded.default, ...loaded }

/** What a refused or failed run says. */
async function error(run) {
  try {
    return { outputs: await run() }
  } catch (problem) {
    return { name: problem.constructor.name, message: problem.message }
  }
}

const said = {}
if (asked.package === 'wavespeed-0.0') {
  const client = new found.WaveSpeed(asked.key, { baseUrl: `${asked.url}/api/v3/`, pollInterval: 0.05 })
  const prediction = await client.run(asked.model, asked.input)
  said.outputs = prediction.outputs
  said.image = await client.upload(new Blob([readFileSync(asked.file)]))
  said.refused = await error(() => client.run(asked.model, { ...asked.input, num_images: 9 }))
} else {
  const client = new found.Client(asked.key, { baseUrl: asked.url })
  const quick = { pollInterval: 0.05 }
  said.outputs = (await client.run(asked.model, asked.input, quick)).outputs
  said.sync = (await client.run(asked.model, asked.input, { enableSyncMode: true })).outputs
  said.image = await client.upload(asked.file)
  said.refused = await error(() => client.run(asked.model, { ...asked.input, num_images: 9 }, quick))
  said.failed = await error(() => client.run(asked.model, { ...asked.input, loras: [{ path: 'nobody' }] }, quick))
}
const again = { ...asked.input, image: said.image, strength: 0.01 }
said.edited = asked.package === 'wavespeed-0.0'
  ? (await new found.WaveSpeed(asked.key, { baseUrl: `${asked.url}/api/v3/`, pollInterval: 0.05 }).run(asked.model, again)).outputs
  : (await new found.Client(asked.key, { baseUrl: asked.url }).run(asked.model, again, { pollInterval: 0.05 })).outputs
console.log(JSON.stringify(said))
