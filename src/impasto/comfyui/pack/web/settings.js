// The Impasto part of ComfyUI's Settings. They are kept in ComfyUI's user folder, never in a workflow.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "Impasto.Settings",
  settings: [
    {
      id: "Impasto.ServerURL",
      category: ["Impasto", "Server", "Address"],
      name: "Address of the Impasto server",
      tooltip:
        "Empty: http://127.0.0.1:8000. A host other than this machine must be allowed by IMPASTO_SERVER_HOSTS. " +
        "The variable IMPASTO_SERVER_URL goes first.",
      type: "text",
      defaultValue: "",
    },
    {
      id: "Impasto.APIKey",
      category: ["Impasto", "Server", "API key"],
      name: "API key",
      tooltip: "From `impasto keys create comfyui`. The variable IMPASTO_API_KEY goes first.",
      type: "text",
      defaultValue: "",
      attrs: { type: "password", autocomplete: "off" },
    },
  ],
});
