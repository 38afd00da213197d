// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

// versionOutput is the JSON of the verb; docs/json.md describes it.
type versionOutput struct {
	Version   string `json:"version"`
	GoVersion string `json:"go_version"`
	OS        string `json:"os"`
	Arch      string `json:"arch"`
}

func versionLine() string {
	return fmt.Sprintf("criuhook %s (%s, %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

func newVersion() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "version [-o table|json]",
		Short: "Print criuhook's version",
		Long:  "Print criuhook's version, the Go version that built it, and for which system.",
		Example: `  criuhook version
  criuhook version -o json`,
		Args:                  noArgs,
		DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), versionOutput{version, runtime.Version(), runtime.GOOS, runtime.GOARCH})
			}
			_, err := fmt.Fprint(cmd.OutOrStdout(), versionLine())
			return err
		},
	}
	outputFlag(cmd, &output, "table", "json")
	return cmd
}
