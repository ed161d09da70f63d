// The served models and the forms they take: from the model list with a key, and without one from the API's schema.

import { ApiError, call, send } from "./api.js";

/** Return `[{id, description, schema}]`; `schema` is the JSON Schema of the request body. */
export async function loadModels(hasKey) {
  try {
    if (hasKey) return fromList(await call("api/v3/models"));
  } catch (error) {
    if (!(error instanceof ApiError) || error.status !== 401) throw error;
  }
  return fromOpenApi(await (await send("openapi.json")).json());
}

function fromList(entries) {
  const models = entries.map((entry) => {
    const schemas = entry.api_schema.api_schemas;
    const run = schemas.find((each) => each.type === "model_run") ?? schemas[0];
    return { id: entry.model_id, description: entry.description, schema: run.request_schema };
  });
  return models.filter(({ schema }) => schema.properties?.prompt);
}

function fromOpenApi(document) {
  const models = [];
  for (const [path, { post }] of Object.entries(document.paths)) {
    const schema = resolved(document, post?.requestBody?.content?.["application/json"]?.schema);
    if (!path.startsWith("/api/v3/") || !schema?.properties?.prompt) continue;
    models.push({ id: path.slice("/api/v3/".length), description: post.description, schema });
  }
  return models;
}

function resolved(document, schema) {
  if (!schema?.$ref) return schema;
  return schema.$ref.slice(2).split("/").reduce((part, name) => part[name], document);
}
